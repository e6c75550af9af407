"""RMSNorm's kernels: the error rule over widths, dtypes and strides; compiled; bit for bit."""

import pytest
import torch
from kernel_device import DEVICE, DTYPES, GPU_UNLESS_INTERPRETED, INTERPRETED, LOW_DTYPES
from kernel_statements import check_compiled, check_kernel, check_op, random, with_grads
from torch import Tensor

from sevenfold.ops.rms_norm import eager, triton_residual, triton_rms_norm
from sevenfold.ops.testing import poisoned_allocations

pytestmark = GPU_UNLESS_INTERPRETED
EPS = 1e-5
SHAPES = [(129, 96), (3, 700, 2048), (70, 6144), (5, 16384), (4099, 128)]
if INTERPRETED:
    SHAPES = [(5, 1), (2, 3, 12), (1, 16)]
each = pytest.mark.parametrize(("shape", "dtype"), [(s, d) for s in SHAPES for d in DTYPES])


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return triton_rms_norm.rms_norm(x, weight, EPS)


def gated(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return triton_rms_norm.gated_rms_norm(x, gate, weight, EPS)


def residual(stream: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return triton_residual.residual_rms_norm(stream, update, weight, EPS, 3.5565588200778455, 0.5)


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    return eager.rms_norm(x, weight, EPS)


def eager_gated(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return eager.rms_norm(x, weight, EPS) * torch.sigmoid(gate)


def eager_residual(stream: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.add(0.5 * update, stream, alpha=3.5565588200778455)
    return eager.rms_norm(x, weight, EPS), x


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Two inputs, a weight, and two gradients of outputs."""
    first, second, dy, dx = (random(*shape, dtype=dtype, seed=i) for i in range(4))
    return [first, second], random(shape[-1], dtype=dtype, seed=4), [dy, dx]


@each
def test_norm_keeps_to_the_error_rule(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (x, _), weight, (dy, _) = inputs(shape, dtype)
    check_kernel(norm, eager_norm, [x, weight], [dy])


@each
def test_gated_norm_keeps_to_the_error_rule(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (x, gate), weight, (dy, _) = inputs(shape, dtype)
    check_kernel(gated, eager_gated, [x, 3 * gate, weight], [dy])


@each
def test_residual_norm_keeps_to_the_error_rule(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (stream, update), weight, dys = inputs(shape, dtype)
    check_kernel(residual, eager_residual, [stream, update, weight], dys)


@each
def test_the_norm_alone_is_that_beside_the_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (stream, update), weight, _ = inputs(shape, dtype)
    factors = (EPS, 3.5565588200778455, 0.5)
    with poisoned_allocations():
        found = triton_residual.post_rms_norm(stream, update, weight, *factors)
    assert torch.equal(found, residual(stream, update, weight)[0])


def test_an_fp32_stream_takes_a_low_update() -> None:
    (stream, update), weight, dys = inputs((7, 24), torch.float32)
    leaves = [stream, update.to(DTYPES[1]), weight]
    found = with_grads(residual, leaves, dys)
    assert [t.dtype for t in found] == [torch.float32, *[leaf.dtype for leaf in (stream, *leaves)]]
    check_kernel(residual, eager_residual, leaves, dys)


def test_low_rows_take_an_fp32_weight() -> None:
    (x, gate), weight, (dy, _) = inputs((40, 6), torch.float32)
    check_kernel(gated, eager_gated, [x.to(DTYPES[1]), gate.to(DTYPES[1]), weight], [dy])


def test_one_output_alone() -> None:
    (stream, update), weight, (dy, dx) = inputs((7, 24), torch.float32)
    leaves = [stream, update, weight]
    check_kernel(lambda *t: residual(*t)[0], lambda *t: eager_residual(*t)[0], leaves, [dy])

    def summed(run, stream: Tensor, update: Tensor) -> Tensor:
        return run(stream, update, weight.to(stream.dtype))[1]

    check_kernel(
        lambda *t: summed(residual, *t), lambda *t: summed(eager_residual, *t), leaves[:2], [dx]
    )


def test_views_that_are_not_contiguous() -> None:
    (x, gate), weight, (dy, _) = inputs((6, 16), torch.float32)
    wide, tall = torch.cat([x, gate], 1), gate.t().contiguous().t()
    plain = with_grads(gated, [x, gate, weight], [dy])
    for views in (
        [wide[:, :16], tall, weight],
        [x, wide[:, 16:], torch.stack([weight] * 2, 1)[:, 0]],
    ):
        y = gated(*views)
        assert torch.equal(y, plain[0])
        grads = triton_rms_norm.gated_rms_norm_backward(dy.t().contiguous().t(), *views, EPS)
        assert all(torch.equal(a, b) for a, b in zip(grads, plain[1:], strict=True))


def test_no_rows() -> None:
    (x, gate), weight, dys = inputs((0, 8), torch.float32)
    assert triton_residual.post_rms_norm(x, gate, weight, EPS, 1.0, 1.0).shape == (0, 8)
    for run, leaves, n in ((norm, [x], 1), (gated, [x, gate], 1), (residual, [x, gate], 2)):
        found = with_grads(run, [*leaves, weight], dys[:n])
        assert [t.shape for t in found[:-1]] == [(0, 8)] * (n + len(leaves))
        assert torch.equal(found[-1], torch.zeros_like(weight))


def test_large_activations_stay_finite_in_fp16() -> None:
    x = torch.full((2, 8), 6e4, dtype=torch.float16, device=DEVICE)
    weight = torch.ones(8, dtype=torch.float16, device=DEVICE)
    found = with_grads(norm, [x, weight], [torch.ones_like(x)])
    assert torch.equal(found[0], torch.ones_like(x))  # 6e4^2 is far beyond fp16
    assert all(bool(t.isfinite().all()) for t in found)


def test_nothing_is_read_unwritten_and_every_run_gives_the_same_bits() -> None:
    (x, gate), weight, dys = inputs((37, 24) if INTERPRETED else (5000, 2048), torch.float32)
    for run, leaves, n in ((gated, [x, gate], 1), (residual, [x, gate], 2)):
        first = with_grads(run, [*leaves, weight], dys[:n])
        with poisoned_allocations():
            second = with_grads(run, [*leaves, weight], dys[:n])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="slow: test_triton_activations compiles there")
@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore::DeprecationWarning")  # Inductor's
def test_compiles_whole() -> None:
    (x, gate), weight, dys = inputs((2, 37, 256), LOW_DTYPES[0])
    check_compiled(norm, [x, weight], dys[:1])
    check_compiled(gated, [x, gate, weight], dys[:1])
    check_compiled(residual, [x, gate, weight], dys)


def test_opcheck() -> None:
    (x, gate), weight, _ = inputs((3, 12), torch.float32)
    x, gate, weight = (t.requires_grad_() for t in (x, gate, weight))
    check_op(triton_rms_norm.rms_norm, (x, weight, EPS))
    check_op(triton_rms_norm.gated_rms_norm, (x, gate, weight, EPS))
    check_op(triton_residual.residual_rms_norm, (x, gate, weight, EPS, 3.5, 0.5))
