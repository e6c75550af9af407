"""SiLU of the projection and SwiGLU: the error rule, layouts, compiled."""

import pytest
import torch
from kernel_device import DTYPES, GPU_UNLESS_INTERPRETED, INTERPRETED, LOW_DTYPES
from kernel_statements import check_compiled, check_kernel, check_op, random, with_grads
from torch import Tensor

from sevenfold.ops.silu_qkv import eager as eager_silu_qkv
from sevenfold.ops.silu_qkv import triton_silu_qkv
from sevenfold.ops.swiglu import eager as eager_swiglu
from sevenfold.ops.swiglu import triton_swiglu
from sevenfold.ops.testing import poisoned_allocations

pytestmark = GPU_UNLESS_INTERPRETED
WIDTHS = [1, 6, 16] + ([] if INTERPRETED else [513, 1792, 9216])
HEADS = [(1, 1), (2, 6), (3, 16)] + ([] if INTERPRETED else [(5, 64), (7, 96), (16, 128), (2, 256)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("F", WIDTHS)
def test_swiglu_keeps_to_the_error_rule(F: int, dtype: torch.dtype) -> None:
    gate_up, dy = random(3, 7, 2 * F, dtype=dtype), random(3, 7, F, dtype=dtype, seed=1)
    check_kernel(triton_swiglu.swiglu, eager_swiglu.swiglu, [3 * gate_up], [dy])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "D"), HEADS)
def test_silu_qkv_keeps_to_the_error_rule(H: int, D: int, dtype: torch.dtype) -> None:
    qkv = 3 * random(2, 5, H * 3 * D, dtype=dtype)
    dys = [random(2, 5, H, D, dtype=dtype, seed=i) for i in range(1, 4)]
    check_kernel(
        lambda x: triton_silu_qkv.silu_qkv(x, H),
        lambda x: eager_silu_qkv.forward(x, H),
        [qkv],
        dys,
    )


def test_q_k_v_are_token_major_and_contiguous() -> None:
    for x in triton_silu_qkv.silu_qkv(random(2, 5, 2 * 3 * 8), 2):
        assert (x.shape, x.is_contiguous()) == ((2, 5, 2, 8), True)


def test_inputs_and_gradients_that_are_not_contiguous() -> None:
    x, dy = random(6, 24), random(6, 12, seed=1)
    plain = with_grads(triton_swiglu.swiglu, [x], [dy])
    view, dview = torch.cat([x, x], 1)[:, :24], dy.t().contiguous().t()
    assert torch.equal(triton_swiglu.swiglu(view), plain[0])
    assert torch.equal(triton_swiglu.swiglu_backward(dview, view), plain[1])
    dys = [random(6, 2, 4, seed=i) for i in range(3)]
    parts = with_grads(lambda x: triton_silu_qkv.silu_qkv(x, 2), [x], dys)
    found = triton_silu_qkv.silu_qkv_backward(*(d.mT.contiguous().mT for d in dys), view)
    assert torch.equal(found, parts[3])


def test_no_rows() -> None:
    assert triton_swiglu.swiglu(random(0, 8)).shape == (0, 4)
    assert triton_swiglu.swiglu_backward(random(0, 4), random(0, 8)).shape == (0, 8)
    assert [x.shape for x in triton_silu_qkv.silu_qkv(random(0, 12), 2)] == [(0, 2, 2)] * 3


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, in the interpreter
def test_extreme_gates_stay_finite() -> None:
    x = random(4, 8).sign() * 3e4
    found = with_grads(triton_swiglu.swiglu, [x.half()], [torch.zeros_like(x[:, :4])])
    assert bool(found[1].isfinite().all())
    q, _, _ = triton_silu_qkv.silu_qkv(x[:, :6].contiguous(), 1)
    assert torch.equal(q, x[:, None, :2].clamp(min=0))


def test_nothing_is_read_unwritten() -> None:
    x, dy = random(7, 24), random(7, 12, seed=1)
    dys = [random(7, 2, 4, seed=i) for i in range(3)]
    for run, grads in (
        (triton_swiglu.swiglu, [dy]),
        (lambda x: triton_silu_qkv.silu_qkv(x, 2), dys),
    ):
        first = with_grads(run, [x], grads)
        with poisoned_allocations():
            second = with_grads(run, [x], grads)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = triton_silu_qkv.silu_qkv(x, 2)
    return q, k, triton_swiglu.swiglu(v)


@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore::DeprecationWarning")  # Inductor's
def test_compiles_whole() -> None:
    dys = [random(2, 5, 2, 64), random(2, 5, 2, 64, seed=1), random(2, 5, 2, 32, seed=2)]
    check_compiled(both, [random(2, 5, 2 * 3 * 64, dtype=LOW_DTYPES[0])], dys)


def test_opcheck() -> None:
    x = random(3, 24).requires_grad_()
    check_op(triton_swiglu.swiglu, (x,))
    check_op(triton_silu_qkv.silu_qkv, (x, 2))
