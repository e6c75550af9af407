"""A few rows through a block on a GPU: half a layer in a few kernels around its mixer's own."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sevenfold.models.batch import Batch
from sevenfold.models.block import Block
from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.models.layers import RMSNorm, frequency
from sevenfold.models.mixers import LightningAttention, SoftmaxAttention
from sevenfold.models.state import LayerState
from sevenfold.models.stepping_parts import (
    dense_over_ranks,
    experts_over_ranks,
    lightning_over_ranks,
    softmax_over_ranks,
)
from sevenfold.ops import (
    DeviceExperts,
    Fed,
    LightningWeights,
    Norm,
    Residual,
    dense_on_device,
    experts_on_device,
    feed_lightning,
    feed_softmax,
    join_lightning,
    join_softmax,
    rotate_on_device,
    suits_device_router,
    suits_device_weights,
)

DeviceMix = Callable[[Tensor, Batch, LayerState], tuple[Tensor, LayerState]]
# From what a mixer has computed, [M, H D], and what it was fed, or its stream, to the next stream.
LightningEnd = Callable[[Tensor, Fed], Tensor]
SoftmaxEnd = Callable[[Tensor, Tensor], Tensor]


def device_mix(layer: Block) -> DeviceMix | None:
    """Return a block's first half over x [B, T, D] on a GPU; None where only its modules serve."""
    mixer, residual = layer.self_attn, Residual(*layer.mixer_factors, layer.post_norm)
    norm, ranks = norm_of(layer.input_layernorm), layer.ranks
    if isinstance(mixer, SoftmaxAttention):
        layers = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
        if not suits_device_weights([layer.weight for layer in layers]):
            return None
        end = partial(_joined_softmax, mixer.o_proj.weight, residual)
        if ranks is not None:
            end = partial(softmax_over_ranks, mixer.o_proj.weight, residual, ranks)
        return _softmax(mixer, norm, residual, end)
    # What stands in for it on a rank has the same parts; without its ranks it is not the whole.
    heads: LightningAttention = mixer  # pyright: ignore[reportAssignmentType]
    if heads.norm_groups > 1 or (ranks is None and not isinstance(mixer, LightningAttention)):
        return None
    weights = lightning_weights(heads)
    if not suits_device_weights((weights.qkv, weights.gate, weights.out)):
        return None
    end = partial(_joined_lightning, weights, residual)
    if ranks is not None:
        end = partial(lightning_over_ranks, weights, residual, ranks, heads.norm_groups == 1)
    return _lightning(heads, norm, weights, residual, end)


def device_feed(layer: Block) -> Callable[[Tensor], Tensor] | None:
    """Return a block's second half over rows [M, D] on a GPU; None where only its modules serve."""
    norm, mlp, ranks = norm_of(layer.post_attention_layernorm), layer.mlp, layer.ranks
    residual = Residual(*layer.mlp_factors, layer.post_norm)
    if not isinstance(mlp, MixtureOfExperts):
        gate_up, down = mlp.gate_up_proj.weight, mlp.down_proj.weight
        if not suits_device_weights((gate_up, down)):
            return None
        if ranks is not None:
            return partial(dense_over_ranks, norm, (gate_up, down), residual, ranks)
        return lambda x: dense_on_device(x, norm, gate_up, down, residual)
    router = mlp.gate
    experts = DeviceExperts(
        router.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj, router.num_chosen
    )
    if mlp.shared_mlp is not None or not suits_device_router(router.weight, router.num_chosen):
        return None
    if not suits_device_weights((experts.gate_up, experts.down)):
        return None
    if ranks is not None:
        return partial(experts_over_ranks, norm, experts, residual, ranks)
    return lambda x: experts_on_device(x, norm, experts, residual)


def lightning_weights(mixer: LightningAttention) -> LightningWeights:
    """What a mixer computes with."""
    return LightningWeights(
        mixer.qkv_proj.weight,
        mixer.output_gate.weight,
        norm_of(mixer.norm),
        mixer.out_proj.weight,
        mixer.log_decay,
    )


def norm_of(norm: RMSNorm) -> Norm:
    """A norm's weight and eps."""
    return Norm(norm.weight, norm.eps)


def _joined_lightning(weights: LightningWeights, residual: Residual, o: Tensor, fed: Fed) -> Tensor:
    return join_lightning(o, fed, weights, residual)


def _joined_softmax(out: Tensor, residual: Residual, o: Tensor, stream: Tensor) -> Tensor:
    return join_softmax(o, out, stream, residual)


def _lightning(
    mixer: LightningAttention,
    norm: Norm,
    weights: LightningWeights,
    residual: Residual,
    end: LightningEnd,
) -> DeviceMix:
    def mix(x: Tensor, batch: Batch, state: LayerState) -> tuple[Tensor, LayerState]:
        B, T, _ = x.shape
        fed = feed_lightning(x.flatten(0, 1), norm, weights, residual)
        q, k, v = (y.unflatten(0, (B, T)) for y in fed.tokens)
        o, after = mixer.attend(q, k, v, batch, state)  # pyright: ignore[reportArgumentType]
        y = end(o.reshape(B * T, -1), fed)
        return y.view_as(x), state if after is None else after

    return mix


def _softmax(mixer: SoftmaxAttention, norm: Norm, residual: Residual, end: SoftmaxEnd) -> DeviceMix:
    weights, turn = (mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight), None
    if mixer.rotary_dim:
        device = weights[0].device
        turn = frequency(mixer.rotary_dim, mixer.rope_theta, device=device, dtype=torch.float32)

    def mix(x: Tensor, batch: Batch, state: LayerState) -> tuple[Tensor, LayerState]:
        B, T, _ = x.shape
        rows, stream = feed_softmax(x.flatten(0, 1), norm, weights, residual)
        q, k, v = (y.unflatten(1, (-1, mixer.head_dim)) for y in rows)
        if turn is not None:
            rotate_on_device(q, k, batch.positions.flatten(), turn)
        q, k, v = (y.unflatten(0, (B, T)) for y in (q, k, v))
        o = mixer.attend(q, k, v, batch, state)  # pyright: ignore[reportArgumentType]
        return end(o.reshape(B * T, -1), stream).view_as(x), state

    return mix
