"""One token a sequence through a block on a CPU: half a layer a call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from sevenfold.models.batch import Batch
from sevenfold.models.block import Block
from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.models.layers import RMSNorm
from sevenfold.models.mixers import LightningAttention
from sevenfold.models.state import LayerState, LinearState, PooledState
from sevenfold.ops import (
    DenseRows,
    ExpertRows,
    LightningRows,
    LightningWeights,
    Norm,
    Residual,
    suits_few_rows,
)


@dataclass(frozen=True)
class _Halves:
    """A block's halves, ready to run, and the tensors that they read; None goes layer by layer.

    sources: (where a tensor hangs, its name): a module's own dictionaries, because nn.Module's
        attributes cost as much as a product of one token.
    places: the tensors' addresses.
    """

    mix: LightningRows | None
    feed: Callable[[Tensor], Tensor] | None
    sources: tuple[tuple[dict, str], ...]
    places: list[int]

    def are_current(self) -> bool:
        """Whether the block's tensors lie where they lay."""
        return [held[name].data_ptr() for held, name in self.sources] == self.places


_HALVES: WeakKeyDictionary[Block, _Halves] = WeakKeyDictionary()


def pays_by_rows(x: Tensor, batch: Batch) -> bool:
    """Whether x [B, T, D] is a decoding step of a few sequences on a CPU."""
    return batch.is_step and suits_few_rows(x)


def run_by_rows(
    layer: nn.Module, x: Tensor, batch: Batch, state: LayerState
) -> tuple[Tensor, LayerState]:
    """Run a block on one token of each sequence; the result is Block.forward's."""
    if not isinstance(layer, Block):
        raise TypeError(f"layer must be a Block, got {type(layer).__name__}")
    halves = _HALVES.get(layer)
    if halves is None or not halves.are_current():
        halves = _HALVES[layer] = _halves(layer)
    if halves.mix is not None and isinstance(state, LinearState):
        y, kv = halves.mix(x.flatten(0, 1), state.kv)
        x, state = y.view_as(x), LinearState(kv)
    elif halves.mix is not None and isinstance(state, PooledState):
        x = _mix_in_pool(halves.mix, x.flatten(0, 1), state).view_as(x)
    else:
        x, after = layer.mix(x, batch, state)
        state = state if after is None else after
    if halves.feed is None:
        return layer.feed(x)[0], state
    return halves.feed(x.flatten(0, 1)).view_as(x), state


def _mix_in_pool(mix: LightningRows, x: Tensor, state: PooledState) -> Tensor:
    if len(state.slots) == 1:
        at = int(state.slots)
        return mix.advance(x, state.pool[at : at + 1])
    y, kv = mix(x, state.pool[state.slots])
    state.pool[state.slots] = kv
    return y


def _halves(layer: Block) -> _Halves:
    sources: list[tuple[dict[str, Any], str]] = [
        (module._parameters, name) for module, name, _ in _parameters(layer)
    ]
    mix = feed = None
    if all(parameter.is_contiguous() for _, _, parameter in _parameters(layer)):
        feed = _feed(layer) if _is_plain(layer.mlp) else None
        mixer = layer.self_attn
        if isinstance(mixer, LightningAttention) and _is_plain(mixer) and mixer.norm_groups == 1:
            mix = _mix(layer, mixer)
            sources.append((vars(mixer), "log_decay"))
    places = [held[name].data_ptr() for held, name in sources]
    return _Halves(mix, feed, tuple(sources), places)


def _is_plain(half: nn.Module) -> bool:
    """Whether a half holds its weights as parameters, and nothing stands in for its methods.

    What holds weights otherwise has buffers; sevenfold.parallel replaces methods.
    """
    replaced = any(vars(m).keys() & {"forward", "routed"} for m in half.modules())
    return not replaced and next(half.buffers(), None) is None


def _parameters(layer: Block) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, name, parameter)
        for module in layer.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]


def _mix(layer: Block, mixer: LightningAttention) -> LightningRows:
    weights = LightningWeights(
        mixer.qkv_proj.weight,
        mixer.output_gate.weight,
        _norm(mixer.norm),
        mixer.out_proj.weight,
        mixer.log_decay,
    )
    residual = Residual(*layer.mixer_factors, layer.post_norm)
    return LightningRows(_norm(layer.input_layernorm), weights, residual)


def _feed(layer: Block) -> Callable[[Tensor], Tensor] | None:
    norm = _norm(layer.post_attention_layernorm)
    residual, mlp = Residual(*layer.mlp_factors, layer.post_norm), layer.mlp
    if not isinstance(mlp, MixtureOfExperts):
        return DenseRows(norm, mlp.gate_up_proj.weight, mlp.down_proj.weight, residual)
    if mlp.shared_mlp is not None:
        return None
    gate_up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
    router, chosen = mlp.gate.weight, mlp.gate.num_chosen
    return ExpertRows(norm, router, gate_up, down, residual, num_chosen=chosen)


def _norm(norm: RMSNorm) -> Norm:
    return Norm(norm.weight, norm.eps)
