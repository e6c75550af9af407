"""A few rows through a block on a GPU: half a layer in a few kernels around its mixer's own."""

from collections.abc import Callable

import torch
from torch import Tensor

from sevenfold.models.batch import Batch
from sevenfold.models.block import Block
from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.models.layers import RMSNorm, frequency
from sevenfold.models.mixers import LightningAttention, SoftmaxAttention
from sevenfold.models.state import LayerState
from sevenfold.ops import (
    DeviceExperts,
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


def device_mix(layer: Block) -> DeviceMix | None:
    """Return a block's first half over x [B, T, D] on a GPU; None where only its modules serve."""
    mixer, residual = layer.self_attn, Residual(*layer.mixer_factors, layer.post_norm)
    norm = norm_of(layer.input_layernorm)
    if isinstance(mixer, LightningAttention) and mixer.norm_groups == 1:
        weights = lightning_weights(mixer)
        if not suits_device_weights((weights.qkv, weights.gate, weights.out)):
            return None
        return _lightning(mixer, norm, weights, residual)
    if isinstance(mixer, SoftmaxAttention):
        layers = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
        if not suits_device_weights([layer.weight for layer in layers]):
            return None
        return _softmax(mixer, norm, residual)
    return None


def device_feed(layer: Block) -> Callable[[Tensor], Tensor] | None:
    """Return a block's second half over rows [M, D] on a GPU; None where only its modules serve."""
    norm, mlp = norm_of(layer.post_attention_layernorm), layer.mlp
    residual = Residual(*layer.mlp_factors, layer.post_norm)
    if not isinstance(mlp, MixtureOfExperts):
        gate_up, down = mlp.gate_up_proj.weight, mlp.down_proj.weight
        if not suits_device_weights((gate_up, down)):
            return None
        return lambda x: dense_on_device(x, norm, gate_up, down, residual)
    router = mlp.gate
    experts = DeviceExperts(
        router.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj, router.num_chosen
    )
    if mlp.shared_mlp is not None or not suits_device_router(router.weight, router.num_chosen):
        return None
    if not suits_device_weights((experts.gate_up, experts.down)):
        return None
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


def _lightning(
    mixer: LightningAttention, norm: Norm, weights: LightningWeights, residual: Residual
) -> DeviceMix:
    def mix(x: Tensor, batch: Batch, state: LayerState) -> tuple[Tensor, LayerState]:
        B, T, _ = x.shape
        fed = feed_lightning(x.flatten(0, 1), norm, weights, residual)
        q, k, v = (y.unflatten(0, (B, T)) for y in fed.tokens)
        o, after = mixer.attend(q, k, v, batch, state)  # pyright: ignore[reportArgumentType]
        y = join_lightning(o.reshape(B * T, -1), fed, weights, residual)
        return y.view_as(x), state if after is None else after

    return mix


def _softmax(mixer: SoftmaxAttention, norm: Norm, residual: Residual) -> DeviceMix:
    weights = (mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight)
    out, turn = mixer.o_proj.weight, None
    if mixer.rotary_dim:
        device = out.device
        turn = frequency(mixer.rotary_dim, mixer.rope_theta, device=device, dtype=torch.float32)

    def mix(x: Tensor, batch: Batch, state: LayerState) -> tuple[Tensor, LayerState]:
        B, T, _ = x.shape
        rows, stream = feed_softmax(x.flatten(0, 1), norm, weights, residual)
        q, k, v = (y.unflatten(1, (-1, mixer.head_dim)) for y in rows)
        if turn is not None:
            rotate_on_device(q, k, batch.positions.flatten(), turn)
        q, k, v = (y.unflatten(0, (B, T)) for y in (q, k, v))
        o = mixer.attend(q, k, v, batch, state)  # pyright: ignore[reportArgumentType]
        return join_softmax(o.reshape(B * T, -1), out, stream, residual).view_as(x), state

    return mix
