"""Half a layer of a few rows on a GPU: what a decoding step runs around its mixers' recurrence.

A step of one token reads each weight once, and the rest is launches: half a layer is three to five
kernels here, where its operators one by one are fifteen, and each begins while the one before it
runs. Nothing waits for the host and nothing is allocated by what tensors hold, so that CUDA graphs
hold all of it. Inference only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.ops.few_rows.tiles import few_rows, gate_up_tile, linear_tile
from sevenfold.ops.few_rows.types import LightningWeights, Norm, Residual
from sevenfold.ops.triton_rules import runs_on_gpu

_ALIGNMENT = 16  # bytes of the widest load
# Of a router: a row, its logits, and their weights by some columns stay in registers.
_MAX_EXPERTS, _MAX_CHOSEN, _MAX_WIDTH = 64, 8, 16384


class Fed(NamedTuple):
    """What lightning attention takes: q, k, v [M, H, D]; and what its output joins.

    gate: [M, H D], before its sigmoid.
    stream: [M, hidden_size].
    """

    tokens: tuple[Tensor, Tensor, Tensor]
    gate: Tensor
    stream: Tensor


def suits_device_rows(x: Tensor) -> bool:
    """Whether x [..., D] has few rows on a GPU, and needs no gradient.

    Few are 1 to 128 in bf16 and fp16, and 1 to 64 in fp32.

    Not under autocast, which works on PyTorch's own operators, nor in what torch.compile follows.
    """
    return (
        runs_on_gpu(x)
        and 0 < x.numel() <= few_rows(x) * x.shape[-1]
        and x.shape[-1] <= _MAX_WIDTH
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
    )


def suits_device_weights(weights: Sequence[Tensor]) -> bool:
    """Whether weights [..., N, K] are of one dtype, contiguous and aligned for the widest loads."""
    bytes_each, dtype = weights[0].element_size(), weights[0].dtype
    return all(
        w.dtype is dtype
        and w.is_contiguous()
        and w.data_ptr() % _ALIGNMENT == 0
        and w.shape[-1] * bytes_each % _ALIGNMENT == 0
        for w in weights
    )


def suits_device_router(router: Tensor, num_chosen: int) -> bool:
    """Whether a router's weight [E, D] has at most 64 experts, and a row at most 8."""
    return len(router) <= _MAX_EXPERTS and num_chosen <= _MAX_CHOSEN


def suits_device_rotation(q: Tensor, k: Tensor) -> bool:
    """Whether rotate_on_device takes queries and keys of any number of rows, and may change them.

    bf16, fp16 or fp32 on a GPU, contiguous, where nobody needs a gradient.
    """
    return (
        runs_on_gpu(q)
        and q.is_contiguous()
        and k.is_contiguous()
        and q.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def feed_lightning(x: Tensor, norm: Norm, weights: LightningWeights, residual: Residual) -> Fed:
    """Norm, projections and SiLU before lightning attention.

        u = RMSNorm(x)      q, k, v = silu(W_qkv u)      gate = W_gate u

    Args:
        x: [M, D], contiguous, of few rows, dtype of the weights.
        norm: of the input.
        weights: of the layer.
        residual: how the result will join the stream.
    """
    from sevenfold.ops.few_rows import triton_linear

    H, pair = len(weights.log_decay), (weights.qkv, weights.gate)
    tile = linear_tile(len(x), weights.qkv, sum(map(len, pair)))
    qkv, gate, u = triton_linear.project_lightning(x, norm, pair, H, tile)
    q, k, v = qkv.unbind(0)
    return Fed((q, k, v), gate, u if residual.post_norm else x)


def join_lightning(o: Tensor, fed: Fed, weights: LightningWeights, residual: Residual) -> Tensor:
    """Norm, gate, output projection and residual after lightning attention.

        y = alpha * stream + beta * W_out (RMSNorm(o) * sigmoid(gate))

    Args:
        o: [M, H D], contiguous.
        fed: what feed_lightning returned.
        weights: of the layer.
        residual: how the result joins the stream.

    Returns:
        [M, D].
    """
    from sevenfold.ops.few_rows import triton_linear

    tile = linear_tile(len(o), weights.out, len(weights.out))
    by = triton_linear.GatedNorm(weights.norm, fed.gate)
    return triton_linear.join(o, weights.out, fed.stream, residual, tile, by)


def part_of_lightning(o: Tensor, fed: Fed, weights: LightningWeights) -> Tensor:
    """What a rank's heads add to join_lightning, where others have the norm's other channels.

    Args:
        o: [M, H D], contiguous, of this rank's H heads.
        fed: what feed_lightning returned.
        weights: this rank's part of the layer.

    Returns:
        [M D + M] fp32, to be summed over the ranks for join_part_of_lightning.
    """
    from sevenfold.ops.few_rows import triton_linear, triton_parts

    tile = linear_tile(len(o), weights.out, len(weights.out))
    by = triton_linear.GatedNorm(weights.norm, fed.gate)
    return triton_parts.part(
        o, triton_linear.gated_product(o, weights.out, by, tile), weights.norm.eps
    )


def join_part_of_lightning(
    sums: Tensor, fed: Fed, weights: LightningWeights, residual: Residual, num_ranks: int
) -> Tensor:
    """As join_lightning, of what part_of_lightning returned on equal ranks, summed: [M, D]."""
    from sevenfold.ops.few_rows import triton_parts

    num_channels = num_ranks * len(weights.norm.weight)
    return triton_parts.join_part(sums, fed.stream, residual, num_channels, weights.norm.eps)


def join_sum(sums: Tensor, stream: Tensor, residual: Residual) -> Tensor:
    """Join the stream with what ranks computed in part: alpha * stream + beta * sums [M, D].

    Args:
        sums: [M, D], contiguous: of each rank's half a layer with alpha 0 and beta 1.
        stream: [M, D], contiguous.
        residual: of the layer.
    """
    from sevenfold.ops.few_rows import triton_parts

    return triton_parts.join_sum(sums, stream, residual)


def feed_softmax(
    x: Tensor, norm: Norm, weights: Sequence[Tensor], residual: Residual
) -> tuple[list[Tensor], Tensor]:
    """Norm and projections before softmax attention: W_i RMSNorm(x).

    Args:
        x: [M, D], contiguous, of few rows, dtype of the weights.
        norm: of the input.
        weights: one to three, [N_i, D].
        residual: how the result will join the stream.

    Returns:
        [M, N_i] each, and the stream for join_softmax.
    """
    from sevenfold.ops.few_rows import triton_linear

    tile = linear_tile(len(x), weights[0], sum(map(len, weights)))
    rows, u = triton_linear.project(x, norm, weights, tile)
    return rows, u if residual.post_norm else x


def part_of_softmax(o: Tensor, weight: Tensor) -> Tensor:
    """What a rank's heads add to join_softmax: W o [M, D], to be summed for join_sum.

    Args:
        o: [M, K], contiguous, of this rank's heads.
        weight: [D, K].
    """
    from sevenfold.ops.few_rows import triton_linear

    return triton_linear.product(o, weight, o.dtype)


def join_softmax(o: Tensor, weight: Tensor, stream: Tensor, residual: Residual) -> Tensor:
    """Output projection and residual after softmax attention: alpha * stream + beta * W o [M, D].

    Args:
        o: [M, K], contiguous.
        weight: [D, K].
        stream: as feed_softmax returned it.
        residual: how the result joins the stream.
    """
    return _join(o, weight, stream, residual)


class DeviceExperts(NamedTuple):
    """Of a mixture: router [E, D] fp32, gate_up [E, 2 F, D], down [E, D, F], and k."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    num_chosen: int


def experts_on_device(x: Tensor, norm: Norm, experts: DeviceExperts, residual: Residual) -> Tensor:
    """A few tokens through norm, their experts and residual; formula as ExpertRows.

    Args:
        x: [M, D], contiguous, of few rows, dtype of gate_up and down.
        norm: of the input.
        experts: the layer.
        residual: how the result joins the stream.

    Returns:
        [M, D].
    """
    return _fed_experts(x, norm, experts, residual)[0]


def part_of_experts(
    x: Tensor, norm: Norm, experts: DeviceExperts, *, post_norm: bool
) -> tuple[Tensor, Tensor]:
    """What a rank's part of every expert's width adds to experts_on_device, and the stream.

    Sum the first over the ranks for join_sum: [M, D] each.
    """
    return _fed_experts(x, norm, experts, Residual(0.0, 1.0, post_norm))


def _fed_experts(
    x: Tensor, norm: Norm, experts: DeviceExperts, residual: Residual
) -> tuple[Tensor, Tensor]:
    from sevenfold.ops.few_rows import triton_experts, triton_router

    choice = triton_router.choose(x, norm, experts.router, experts.num_chosen)
    stream = choice.u if residual.post_norm else x
    return triton_experts.feed(choice, experts.gate_up, experts.down, stream, residual), stream


def dense_on_device(
    x: Tensor, norm: Norm, gate_up: Tensor, down: Tensor, residual: Residual
) -> Tensor:
    """A few tokens through norm, SwiGLU and residual; formula as DenseRows.

    Args:
        x: [M, D], contiguous, of few rows, dtype of the weights.
        norm: of the input.
        gate_up: [2 F, D].
        down: [D, F].
        residual: how the result joins the stream.

    Returns:
        [M, D].
    """
    return _fed_dense(x, norm, (gate_up, down), residual)[0]


def part_of_dense(
    x: Tensor, norm: Norm, gate_up: Tensor, down: Tensor, *, post_norm: bool
) -> tuple[Tensor, Tensor]:
    """As part_of_experts, of a rank's part of a dense layer's width."""
    return _fed_dense(x, norm, (gate_up, down), Residual(0.0, 1.0, post_norm))


def _fed_dense(
    x: Tensor, norm: Norm, weights: tuple[Tensor, Tensor], residual: Residual
) -> tuple[Tensor, Tensor]:
    from sevenfold.ops.few_rows import triton_experts
    from sevenfold.ops.rms_norm import triton_rms_norm

    u, (gate_up, down) = triton_rms_norm.normed(x, None, *norm), weights
    tile = gate_up_tile(len(x), gate_up.unsqueeze(0))
    hidden = triton_experts.dense_gate_up(u, gate_up, tile)
    stream = u if residual.post_norm else x
    return _join(hidden, down, stream, residual), stream


def logits_on_device(hidden: Tensor, weight: Tensor) -> Tensor:
    """W h, accumulated and returned in fp32: [M, N].

    Args:
        hidden: [M, K], contiguous, of few rows.
        weight: [N, K], dtype of hidden.
    """
    from sevenfold.ops.few_rows import triton_linear

    return triton_linear.product(hidden, weight, torch.float32)


def rotate_on_device(q: Tensor, k: Tensor, positions: Tensor, frequency: Tensor) -> None:
    """Turn the first r channels of queries and keys in place, half against half.

        y_i = x_i cos - x_{i + r/2} sin,  y_{i + r/2} = x_{i + r/2} cos + x_i sin,  i < r/2

    Args:
        q: [M, H, D], contiguous.
        k: [M, G, D], contiguous.
        positions: [M] int64.
        frequency: [r / 2] fp32, what a position is multiplied by: the angle, in fp32.
    """
    from sevenfold.ops.few_rows import triton_rotate

    triton_rotate.rotate_rows(q, k, positions, frequency)


def _join(x: Tensor, weight: Tensor, stream: Tensor, residual: Residual) -> Tensor:
    from sevenfold.ops.few_rows import triton_linear

    tile = linear_tile(len(x), weight, len(weight))
    return triton_linear.join(x, weight, stream, residual, tile)
