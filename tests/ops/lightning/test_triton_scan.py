"""The scan kernels against fp64, forward and backward: on a GPU, or tiny under the interpreter."""

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from kernel_device import DEVICE, DTYPES, INTERPRETED
from lightning_statements import DECAYS, Inputs, borders, make_inputs
from torch import Tensor

from sevenfold.ops.lightning import eager, segments, triton_launch, triton_op
from sevenfold.ops.testing import check_error, poisoned_allocations

pytestmark = [] if INTERPRETED else pytest.mark.gpu

NAMES = ("o", "final_state", "dq", "dk", "dv", "dinitial_state")
WIDTHS = [(16, 24)] if INTERPRETED else [(64, 64), (96, 256), (128, 64), (64, 128), (128, 128)]
LENGTHS = [(0, 1, 64, 0, 33, 2, 0)] if INTERPRETED else [(0, 1, 64, 0, 65, 2, 0), (1, 700, 3000)]
TOKENS = [70] if INTERPRETED else [1, 63, 64, 65, 500]
SPLIT_TOKENS = 150 if INTERPRETED else 9000


def to_device(x: Inputs) -> Inputs:
    return Inputs(*(y.to(DEVICE) for y in x))


def scan(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, x: Inputs, scale: float, lengths):
    cu_seqlens = None if lengths is None else borders(lengths)
    return triton_op.lightning_scan(q, k, v, x.log_decay, scale, state, cu_seqlens, True)


def chunked(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, x: Inputs, scale: float, lengths):
    lengths = (q.shape[1],) * q.shape[0] if lengths is None else tuple(lengths)
    options = {"scale": scale, "initial_state": state, "lengths": lengths}
    return eager.forward(q, k, v, x.log_decay, **options)


def results(op, x: Inputs, scale: float, lengths: Sequence[int] | None) -> list[Tensor]:
    """o, final_state and the gradients of q, k, v and initial_state."""
    leaves = x.leaves()
    outputs = op(*leaves, x, scale, lengths)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def check_all(x: Inputs, scale: float = 1.0, lengths: Sequence[int] | None = None) -> None:
    """Every result keeps to the error rule; states too, in the dtype of the products they sum."""
    x = to_device(x)
    with poisoned_allocations():
        found = results(scan, x, scale, lengths)
    honest = results(chunked, x, scale, lengths)
    exact = results(chunked, x.to(torch.float64), scale, lengths)
    for name, *three in zip(NAMES, found, honest, exact, strict=True):
        assert three[0].dtype == three[1].dtype
        check_error(name, three[0], three[1].to(x.q.dtype), three[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", DECAYS)
def test_every_decay(decay: str, dtype: torch.dtype) -> None:
    K, V = WIDTHS[-1]
    check_all(make_inputs(decay, 70 if INTERPRETED else 500, K=K, V=V, dtype=dtype), 0.7)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_widths_and_tokens(K: int, V: int, T: int, dtype: torch.dtype) -> None:
    check_all(make_inputs("mixed", T, B=2, K=K, V=V, dtype=dtype), -0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_documents(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    K, V = WIDTHS[-1]
    x = make_inputs("mixed", sum(lengths), N=len(lengths), K=K, V=V, dtype=dtype)
    check_all(x, 1.0, lengths)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("decay", ["first", "middle", "last", "mixed"])
def test_sequences_that_are_cut_into_segments(
    decay: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three segments of about 50 tokens, or of about 3,000.
    monkeypatch.setattr(segments, "MIN_SEGMENT_TOKENS", SPLIT_TOKENS // 3)
    monkeypatch.setattr(triton_launch, "num_sms", lambda _device: 64)
    lengths = (7, SPLIT_TOKENS, 0, 40)
    K, V = WIDTHS[-1]
    x = make_inputs(decay, sum(lengths), N=4, K=K, V=V, dtype=dtype)
    check_all(x, 0.5, lengths)


def test_no_initial_state_means_zeros() -> None:
    K, V = WIDTHS[-1]
    x = to_device(make_inputs("mixed", 70, B=2, K=K, V=V, dtype=DTYPES[-1]))
    zeros = torch.zeros_like(x.initial_state)
    for a, b in zip(
        scan(*x[:3], None, x, 1.0, None), scan(*x[:3], zeros, x, 1.0, None), strict=True
    ):
        assert torch.equal(a, b)


def test_any_layout_gives_the_same_bits() -> None:
    K, V = WIDTHS[-1]
    x = to_device(make_inputs("mixed", 70, B=2, K=K, V=V, dtype=DTYPES[-1]))
    plain = scan(*x[:4], x, 1.0, None)
    joined = torch.cat([x.q, x.k, x.v], dim=-1)  # one projection, as a model hands it over
    views = joined.split([K, K, V], dim=-1)
    heads_first = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in x[:3]]
    odd = [torch.cat([y[..., :1], y], dim=-1)[..., 1:] for y in x[:3]]
    for tokens in (views, heads_first, odd):
        again = scan(*tokens, x.initial_state, x, 1.0, None)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_final_state_is_written_when_asked_for_only() -> None:
    K, V = WIDTHS[-1]
    x = to_device(make_inputs("mixed", 70, B=2, K=K, V=V, dtype=DTYPES[-1]))
    o, none = triton_op.lightning_scan(*x[:4], 1.0, x.initial_state, None, False)
    assert torch.equal(o, scan(*x[:4], x, 1.0, None)[0])
    assert len(none) == 0


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_rows_or_no_tokens(shape: tuple[int, int]) -> None:
    B, T = shape
    x = to_device(make_inputs("mixed", T, B=B, K=16, V=16, dtype=DTYPES[-1]))
    o, final = scan(*x[:4], x, 1.0, None)
    assert o.shape == x.v.shape
    assert torch.equal(final, x.initial_state)


def test_torch_accepts_the_operator() -> None:
    K, V = WIDTHS[-1]
    x = to_device(make_inputs("mixed", 70, N=3, K=K, V=V, dtype=DTYPES[-1]))
    leaves = x.leaves()
    ends = borders(list(accumulate([0, 20, 50]))[:0] or [0, 20, 50])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*leaves[:3], x.log_decay, 0.5, leaves[3], ends, True)
    torch.library.opcheck(triton_op.lightning_scan, arguments, test_utils=tests)
