"""States at borders: plain products against sums token by token; what is refused."""

import pytest
import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops import Span, lightning_add_read, lightning_added
from sevenfold.ops.lightning import borders_eager
from sevenfold.ops.testing import check_error, poisoned_allocations

RATES = torch.tensor([-30.0, -0.4, -1e-3, 0.0])
T, K, V = 23, 4, 6
SPANS = [(Span(0, 9), Span(9, 14)), (Span(3, 0), Span(22, 1)), (Span(5, 11), Span(0, 0))]


def inputs(dtype: torch.dtype) -> list[Tensor]:
    seed = torch.Generator().manual_seed(5)
    widths = ((T, 4, K), (T, 4, V), (2, 4, K, V))
    a, b, states = (torch.randn(*x, generator=seed, dtype=torch.float64) for x in widths)
    return [a.to(dtype), b.to(dtype), states.to(torch.promote_types(dtype, torch.float32))]


def weights(span: Span, from_end: bool) -> Tensor:
    """[T, H] decay^d_i, 0 outside the span."""
    place = torch.arange(T) - span.start
    distance = span.length - 1 - place if from_end else place + 1
    inside = (place >= 0) & (place < span.length)
    return torch.exp(distance.clamp(min=0)[:, None] * RATES.double()) * inside[:, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("from_end", [True, False])
@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("elements", [1, 2**25])
def test_sums_over_spans(
    dtype: torch.dtype,
    from_end: bool,
    spans: tuple[Span, ...],
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(borders_eager, "_BLOCK_ELEMENTS", elements)
    a, b, states = inputs(dtype)
    exact = [x.double() for x in (a, b, states)]
    w = torch.stack([weights(span, from_end) for span in spans])
    added = torch.einsum("nth,thk,thv->nhkv", w, *exact[:2])
    read = exact[1] + torch.einsum("nth,thk,nhkv->thv", w, exact[0], exact[2])
    with poisoned_allocations():
        found = lightning_added(a, b, RATES, spans, from_end=from_end)
        y = b.clone()
        lightning_add_read(y, a, states, RATES, spans, from_end=from_end)
    check_error(
        "added", found, added.to(torch.promote_types(dtype, torch.float32)).to(dtype), added
    )
    check_error("read", y, read.to(dtype), read)


def test_what_does_not_fit_is_refused() -> None:
    a, b, states = inputs(torch.float32)
    how = {"from_end": True}
    with pytest.raises(ValueError, match=r"spans must lie in the 23 tokens, got \(20, 4\)"):
        lightning_added(a, b, RATES, [Span(20, 4)], **how)
    aside = torch.empty(*b.shape, 2)[..., 0]
    with pytest.raises(ValueError, match="y's last stride must be 1, got 2"):
        lightning_add_read(aside, a, states, RATES, SPANS[0], **how)
    with pytest.raises(ValueError, match=r"states must have shape .*\[N, H, K, V\]"):
        lightning_add_read(b, a, states[:1], RATES, SPANS[0], **how)
    with pytest.raises(TypeError, match="states must"):
        lightning_add_read(b, a, states.double(), RATES, SPANS[0], **how)
    with pytest.raises(ValueError, match="log_decay must"):
        lightning_added(a, b, RATES[:3], SPANS[0], **how)
    with pytest.raises(UnsupportedError, match="on a GPU for impl triton"):
        lightning_added(a, b, RATES, SPANS[0], **how, impl="triton")
