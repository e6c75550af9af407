"""Lightning attention by numba: the error rule for outputs, states and every gradient."""

import math

import pytest
import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops import Impl, Snapshots, Stop, lightning_attention, lightning_attention_prefill
from sevenfold.ops.lightning.api import default_impl
from sevenfold.ops.testing import check_error, poisoned_allocations

H = 3
LOG_DECAY = torch.tensor([-math.inf, -0.3, 0.0])
NAMES = ("o", "final_state", "dq", "dk", "dv", "dinitial_state")


def inputs(T: int, N: int, K: int, V: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = [(1, T, H, K), (1, T, H, K), (1, T, H, V), (N, H, K, V)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def cumulated(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def with_gradients(impl: str, tensors: list[Tensor], lengths: tuple[int, ...]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    *qkv, initial = leaves
    options = {"cu_seqlens": cumulated(lengths), "scale": 0.5, "return_final_state": True}
    found = lightning_attention(*qkv, LOG_DECAY, initial_state=initial, impl=impl, **options)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in found]
    return [*(x.detach() for x in found), *torch.autograd.grad(found, leaves, grads)]


@pytest.mark.parametrize(
    ("lengths", "K", "V"),
    [
        ((1,), 32, 32),
        ((70,), 32, 64),
        ((0, 33, 64, 0, 3), 64, 32),
        ((32, 31, 96, 1), 32, 32),
        ((40,), 128, 96),
    ],
)
def test_the_error_rule(lengths: tuple[int, ...], K: int, V: int) -> None:
    tensors = inputs(sum(lengths), len(lengths), K, V)
    with poisoned_allocations():
        found = with_gradients("numba", tensors, lengths)
    honest = with_gradients("eager", tensors, lengths)
    exact = with_gradients("reference", [x.double() for x in tensors], lengths)
    for name, *three in zip(NAMES, found, honest, exact, strict=True):
        check_error(name, *three)


def test_rows_of_a_projection_and_no_state() -> None:
    qkv = torch.randn(2, 50, H, 96, generator=torch.Generator().manual_seed(0))
    views = qkv.split(32, -1)
    expected = lightning_attention(*(x.contiguous() for x in views), LOG_DECAY, impl="numba")
    assert torch.equal(lightning_attention(*views, LOG_DECAY, impl="numba").o, expected.o)
    turned = (x.mT.contiguous().mT for x in views)  # widths are not neighbours
    assert torch.equal(lightning_attention(*turned, LOG_DECAY, impl="numba").o, expected.o)
    exact = lightning_attention(*(x.double() for x in views), LOG_DECAY, impl="reference").o
    check_error("o", expected.o, lightning_attention(*views, LOG_DECAY, impl="eager").o, exact)


def test_a_number_that_is_not_finite_stays_in_its_sequence() -> None:
    q, k, v, _ = inputs(70, 2, 32, 32)
    options = {"cu_seqlens": cumulated((30, 40)), "impl": "numba"}
    before = lightning_attention(q, k, v, LOG_DECAY, **options).o
    k[0, 35, 1, 3] = torch.inf
    v[0, 36] = torch.nan
    after = lightning_attention(q, k, v, LOG_DECAY, **options).o
    assert torch.equal(after[:, :30], before[:, :30])
    assert after[:, 37:].isnan().any()


def test_states_that_are_kept_on_the_way() -> None:
    q, k, v, initial = inputs(70, 1, 32, 32)
    pool = torch.zeros(2, H, 32, 32)
    options = {"initial_state": initial, "impl": "numba"}
    snapshots = Snapshots(pool, (Stop(0, 45, 1),))
    found = lightning_attention_prefill(q, k, v, LOG_DECAY, snapshots, **options)
    first = (x[:, :45] for x in (q, k, v))
    state = lightning_attention(*first, LOG_DECAY, return_final_state=True, **options).final_state
    assert torch.equal(pool[1], state[0])
    whole = lightning_attention(q, k, v, LOG_DECAY, **options).o
    wide = (x.double() for x in (q, k, v))
    exact = lightning_attention(*wide, LOG_DECAY, initial_state=initial.double(), impl="reference")
    check_error("o", found.o, whole, exact.o)


def test_the_default_and_what_is_refused() -> None:
    cpu = torch.device("cpu")
    assert default_impl(cpu, torch.float32, 32, 64) is Impl.NUMBA
    for dtype, K, V in ((torch.float64, 32, 32), (torch.float32, 31, 32), (torch.float32, 32, 33)):
        assert default_impl(cpu, dtype, K, V) is Impl.EAGER
    q, k, v, _ = inputs(3, 1, 32, 32)
    with pytest.raises(UnsupportedError, match=r"q must be fp32 on a CPU, .* got torch.float64"):
        lightning_attention(q.double(), k.double(), v.double(), LOG_DECAY, impl="numba")
    with pytest.raises(UnsupportedError, match="V must be a multiple of 32 for impl numba, got 31"):
        lightning_attention(q, k, v[..., :31], LOG_DECAY, impl="numba")
