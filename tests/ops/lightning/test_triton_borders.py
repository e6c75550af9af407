"""The kernels of states at borders against fp64: on a GPU, or tiny under the interpreter."""

import pytest
import torch
from kernel_device import DEVICE, DTYPES, INTERPRETED
from torch import Tensor

from sevenfold.ops import Span
from sevenfold.ops.lightning import borders, borders_eager
from sevenfold.ops.testing import check_error, poisoned_allocations

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
# The slowest reaches all, the fastest its own token alone.
RATES = torch.tensor([-40.0, -0.5, 0.0] if INTERPRETED else [-40.0, -0.5, -1e-2, -1e-4, 0.0])
if INTERPRETED:
    WIDTHS, SPANS = [(16, 24)], {"two": (Span(3, 70), Span(79, 1)), "one": (Span(2, 0), Span(3, 9))}
else:
    WIDTHS = [(128, 128), (64, 64), (96, 96), (72, 40), (256, 256)]
    SPANS = {
        "two": (Span(0, 70), Span(70, 130)),
        "none and one": (Span(3, 0), Span(199, 1)),
        "long": (Span(7, 9000), Span(9007, 20_000)),
    }


def added(a, b, log_decay, spans, from_end):
    return borders._added_on_gpu(a, b, log_decay, borders._numbers(spans), from_end)


def add_read(y, x, states, log_decay, spans, from_end):
    borders._add_read_on_gpu(y, x, states, log_decay, borders._numbers(spans), from_end)


KERNELS, PRODUCTS = (added, add_read), (borders_eager.added, borders_eager.add_read)


def inputs(name: str, widths: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    seed, H = torch.Generator().manual_seed(len(name)), len(RATES)
    T = max(span.start + span.length for span in SPANS[name])
    shapes = ((T, H, widths[0]), (T, H, widths[1]), (2, H, *widths))
    a, b, states = (torch.randn(*x, generator=seed).to(DEVICE) for x in shapes)
    # Heads and tokens lie apart, as those of joined projections do.
    a = torch.stack([a, a + 1], 2)[:, :, 0]
    return [a.to(dtype), b.to(dtype), states]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("from_end", [True, False])
@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_kernels_give_what_products_do(
    name: str, widths: tuple[int, int], from_end: bool, dtype: torch.dtype
) -> None:
    tokens, spans, log_decay = inputs(name, widths, dtype), SPANS[name], RATES.to(DEVICE)
    for transposed in (False, True):
        results = []
        for functions, is_exact in ((KERNELS, False), (PRODUCTS, False), (PRODUCTS, True)):
            a, b, states = (x.double() if is_exact else x for x in tokens)
            x, y = (b, a.clone()) if transposed else (a, b.clone())
            matrices = states.mT if transposed else states
            with poisoned_allocations():
                sums = functions[0](a, b, log_decay, spans, from_end)
                functions[1](y, x, matrices, log_decay, spans, from_end)
            results.append((sums, y))
        for what, *found in zip(("added", "read"), *results, strict=True):
            ours, eager, exact = found
            check_error(what, ours.to(dtype), eager.to(dtype), exact)


def test_a_fast_head_reads_only_what_it_reaches() -> None:
    """Tokens behind the horizon may hold anything."""
    log_decay = torch.full((2,), -1.0, device=DEVICE)
    a, b = torch.randn(2, 200, 2, 16, device=DEVICE)
    a[:100], b[:100] = float("nan"), float("nan")
    states = added(a, b, log_decay, (Span(0, 200),), True)
    assert states.isfinite().all()
    y = b.clone()
    add_read(y, a, states, log_decay, (Span(0, 200),), True)
    assert y[100:].isfinite().all()
    assert not torch.equal(y[199], b[199])
    assert torch.equal(y[100:150], b[100:150])
