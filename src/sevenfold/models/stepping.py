"""One token a sequence through a block on a CPU: half a layer a call."""

from torch import Tensor, nn

from sevenfold.models.batch import Batch
from sevenfold.models.block import Block
from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.models.mixers import LightningAttention
from sevenfold.models.state import LayerState, LinearState, PooledState
from sevenfold.ops import (
    LightningWeights,
    Norm,
    Residual,
    dense_rows,
    expert_rows,
    lightning_rows,
    suits_few_rows,
)


def pays_by_rows(x: Tensor, batch: Batch) -> bool:
    """Whether x [B, T, D] is a decoding step of a few sequences on a CPU."""
    return batch.is_step and suits_few_rows(x)


def run_by_rows(
    layer: nn.Module, x: Tensor, batch: Batch, state: LayerState
) -> tuple[Tensor, LayerState]:
    """Run a block on one token of each sequence; the result is Block.forward's."""
    if not isinstance(layer, Block):
        raise TypeError(f"layer must be a Block, got {type(layer).__name__}")
    mixer = layer.self_attn
    if isinstance(mixer, LightningAttention) and isinstance(state, LinearState):
        x, kv = _mix(layer, mixer, x, state.kv)
        state = LinearState(kv)
    elif isinstance(mixer, LightningAttention) and isinstance(state, PooledState):
        x, kv = _mix(layer, mixer, x, state.pool[state.slots])
        state.pool[state.slots] = kv
    else:
        x, after = layer.mix(x, batch, state)
        state = state if after is None else after
    return _feed(layer, x), state


def _mix(layer: Block, mixer: LightningAttention, x: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    weights = LightningWeights(
        mixer.qkv_proj.weight,
        mixer.output_gate.weight,
        Norm(mixer.norm.weight, mixer.norm.eps),
        mixer.out_proj.weight,
        mixer.log_decay,
    )
    norm = Norm(layer.input_layernorm.weight, layer.input_layernorm.eps)
    residual = Residual(*layer.mixer_factors, layer.post_norm)
    y, kv = lightning_rows(x.flatten(0, 1), norm, weights, residual, kv)
    return y.view_as(x), kv


def _feed(layer: Block, x: Tensor) -> Tensor:
    norm = Norm(layer.post_attention_layernorm.weight, layer.post_attention_layernorm.eps)
    residual = Residual(*layer.mlp_factors, layer.post_norm)
    rows, mlp = x.flatten(0, 1), layer.mlp
    if not isinstance(mlp, MixtureOfExperts):
        y = dense_rows(rows, norm, mlp.gate_up_proj.weight, mlp.down_proj.weight, residual)
    elif mlp.shared_mlp is None:
        gate_up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
        chosen = mlp.gate.num_chosen
        y = expert_rows(rows, norm, mlp.gate.weight, gate_up, down, residual, num_chosen=chosen)
    else:
        return layer.feed(x)[0]
    return y.view_as(x)
