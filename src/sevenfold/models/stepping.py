"""A few rows through a block, half a layer a call: a decoding step on a CPU, any rows on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from sevenfold.models.batch import Batch
from sevenfold.models.block import Block
from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.models.mixers import LightningAttention
from sevenfold.models.state import LayerState, LinearState, PooledState
from sevenfold.models.stepping_device import (
    device_feed,
    device_mix,
    lightning_weights,
    norm_of,
)
from sevenfold.ops import (
    DenseRows,
    ExpertRows,
    LightningRows,
    Residual,
    suits_device_rows,
    suits_few_rows,
)

Mix = Callable[[Tensor, Batch, LayerState], tuple[Tensor, LayerState] | None]
Feed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Halves:
    """A block's halves, ready to run, and the tensors that they read; None goes layer by layer.

    sources: (where a tensor hangs, its name): a module's own dictionaries, because nn.Module's
        attributes cost as much as a product of one token.
    places: the tensors' addresses.
    """

    mix: Mix | None
    feed: Feed | None
    sources: tuple[tuple[dict, str], ...]
    places: list[int]

    def are_current(self) -> bool:
        """Whether the block's tensors lie where they lay."""
        return [held[name].data_ptr() for held, name in self.sources] == self.places


_HALVES: WeakKeyDictionary[Block, _Halves] = WeakKeyDictionary()


def pays_by_rows(x: Tensor, batch: Batch) -> bool:
    """Whether x [B, T, D] is a decoding step on a CPU, or any step on a GPU, of few tokens."""
    return suits_device_rows(x) or (batch.is_step and suits_few_rows(x))


def run_by_rows(
    layer: nn.Module, x: Tensor, batch: Batch, state: LayerState
) -> tuple[Tensor, LayerState]:
    """Run a block on a few tokens; the result is Block.forward's."""
    if not isinstance(layer, Block):
        raise TypeError(f"layer must be a Block, got {type(layer).__name__}")
    halves = _current_halves(layer, x)
    if halves.mix is None and halves.feed is None:
        x, after, _ = layer(x, batch, state)
        return x, state if after is None else after
    mixed = None if halves.mix is None else halves.mix(x, batch, state)
    if mixed is None:
        x, after = layer.mix(x, batch, state)
        state = state if after is None else after
    else:
        x, state = mixed
    return _fed(layer, halves, x), state


def feed_by_rows(layer: Block, x: Tensor) -> Tensor:
    """Run a block's second half on a few tokens [N, T, D]; the result is Block.feed's."""
    return _fed(layer, _current_halves(layer, x), x)


def _fed(layer: Block, halves: _Halves, x: Tensor) -> Tensor:
    if halves.feed is None:
        return layer.feed(x)[0]
    return halves.feed(x.flatten(0, 1)).view_as(x)


def _current_halves(layer: Block, x: Tensor) -> _Halves:
    halves = _HALVES.get(layer)
    if halves is None or not halves.are_current():
        halves = _HALVES[layer] = _halves(layer, x)
    return halves


def _halves(layer: Block, x: Tensor) -> _Halves:
    sources: list[tuple[dict[str, Any], str]] = [
        (module._parameters, name) for module, name, _ in _parameters(layer)
    ]
    if "log_decay" in vars(layer.self_attn):
        sources.append((vars(layer.self_attn), "log_decay"))
    mix = feed = None
    if all(parameter.is_contiguous() for _, _, parameter in _parameters(layer)):
        to_mix, to_feed = (_mix, _feed) if x.device.type == "cpu" else (device_mix, device_feed)
        sums_parts = layer.ranks is not None
        mix = to_mix(layer) if _is_plain(layer.self_attn, sums_parts) else None
        feed = to_feed(layer) if _is_plain(layer.mlp, sums_parts) else None
    places = [held[name].data_ptr() for held, name in sources]
    return _Halves(mix, feed, tuple(sources), places)


def _is_plain(half: nn.Module, sums_parts: bool) -> bool:
    """Whether a half holds its weights as parameters, and nothing stands in for its methods.

    What holds weights otherwise has buffers; sevenfold.parallel replaces methods, which matters not
    where Block.ranks sums the parts.
    """
    names = set() if sums_parts else {"forward", "routed"}
    replaced = any(vars(m).keys() & names for m in half.modules())
    return not replaced and next(half.buffers(), None) is None


def _parameters(layer: Block) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, name, parameter)
        for module in layer.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]


def _mix(layer: Block) -> Mix | None:
    mixer = layer.self_attn
    if not isinstance(mixer, LightningAttention) or mixer.norm_groups != 1:
        return None
    residual = Residual(*layer.mixer_factors, layer.post_norm)
    rows = LightningRows(norm_of(layer.input_layernorm), lightning_weights(mixer), residual)

    def mix(x: Tensor, batch: Batch, state: LayerState) -> tuple[Tensor, LayerState] | None:
        if isinstance(state, LinearState):
            y, kv = rows(x.flatten(0, 1), state.kv)
            return y.view_as(x), LinearState(kv)
        if isinstance(state, PooledState):
            return _mix_in_pool(rows, x.flatten(0, 1), state).view_as(x), state
        return None

    return mix


def _mix_in_pool(rows: LightningRows, x: Tensor, state: PooledState) -> Tensor:
    if len(state.slots) == 1:
        at = int(state.slots)
        return rows.advance(x, state.pool[at : at + 1])
    y, kv = rows(x, state.pool[state.slots])
    state.pool[state.slots] = kv
    return y


def _feed(layer: Block) -> Feed | None:
    norm = norm_of(layer.post_attention_layernorm)
    residual, mlp = Residual(*layer.mlp_factors, layer.post_norm), layer.mlp
    if layer.ranks is not None:
        return None
    if not isinstance(mlp, MixtureOfExperts):
        return DenseRows(norm, mlp.gate_up_proj.weight, mlp.down_proj.weight, residual)
    if mlp.shared_mlp is not None:
        return None
    gate_up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
    router, chosen = mlp.gate.weight, mlp.gate.num_chosen
    return ExpertRows(norm, router, gate_up, down, residual, num_chosen=chosen)
