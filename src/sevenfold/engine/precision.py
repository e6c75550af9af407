"""Which precision each head's state has: by name, or by how long the head remembers."""

import math
from collections.abc import Iterator
from typing import Literal

from sevenfold.config import ConfigError, StrictModel
from sevenfold.models import ModelConfig
from sevenfold.models.accounting import WeightFormat
from sevenfold.ops import layer_log_decay

StateFormat = Literal["fp32", "bf16", "fp16", "int8"]
StateDtype = StateFormat
SnapshotDtype = Literal["fp32", "fp16", "int8", "auto"]

TURN_TOKENS = 512  # a short turn of a chat: one snapshot in so many tokens
_LARGEST_ERROR = 2**-7
# Largest rounding error, relative to the row's (int8) or its own (fp16) largest element.
_ROUNDING: dict[StateFormat, float] = {"int8": 1 / 254, "fp16": 2**-11}
_BF16_HALF_SPACING = 2**-8  # relative to a number at the lower end of its binade


class Precision(StrictModel):
    """What is kept in how many bits.

    weights: which matrices are quantised on load, and to what: "int8" or "fp8" all of the layers',
        "int8-experts" or "fp8-experts" the experts'; None none.
    states: of running requests. snapshots: of cached states.
    """

    weights: WeightFormat | None = None
    states: StateDtype = "fp32"
    snapshots: SnapshotDtype = "fp32"


def linear_layers(config: ModelConfig) -> list[int]:
    """Return the indices, among all layers, of those with a linear state."""
    return [n for n, kind in enumerate(config.layer_types) if kind == "linear_attention"]


def snapshot_formats(
    config: ModelConfig, dtype: SnapshotDtype
) -> tuple[tuple[StateFormat, ...], ...]:
    """Return the format of each head's cached state, for each linear layer.

    "auto" keeps more bits of a head that remembers longer. A conversation's state is rounded at
    each snapshot that it goes on from, so the errors of one head add up to at most

        error(format) = rounding(format) / (1 - exp(-T / n)),    n = -1 / log_decay_h tokens

    of its largest element, with a snapshot every T = 512 tokens, and rounding = 1/254 for int8,
    2^-11 for fp16. Of int8, fp16 and fp32 it takes the first whose error is at most 2^-7: int8 for
    horizons up to 730 tokens, fp16 up to 7,933, fp32 beyond.

    Args:
        config: the model.
        dtype: one for all heads, or "auto".

    Returns:
        [linear layers][heads].
    """
    return tuple(
        tuple(_by_horizon(n) if dtype == "auto" else dtype for n in horizons)
        for horizons in _horizons(config)
    )


def check_state_dtype(config: ModelConfig, dtype: StateDtype) -> None:
    """Raise unless every head can do its work with an active state of that precision.

    bf16 rounds to nearest, with a spacing of up to 2^-7 of the number. To keep a state level a
    token adds 1 - exp(log_decay_h) of it, as much as it takes away; where that is less than half
    the spacing, 2^-8 (a horizon of more than 255 tokens), both can be rounded away. fp16 is rounded
    stochastically and int8 through the ring, which keep them.

    Args:
        config: the model.
        dtype: of the active states.

    Raises:
        ConfigError: bf16 would erase a head's horizon; the message names the slowest.
    """
    if dtype != "bf16":
        return
    layers = linear_layers(config)
    found = [
        (horizon, layer, head)
        for layer, horizons in zip(layers, _horizons(config), strict=True)
        for head, horizon in enumerate(horizons)
        if -math.expm1(-1 / horizon) < _BF16_HALF_SPACING
    ]
    if found:
        horizon, layer, head = max(found)
        raise ConfigError(
            f"state_dtype must not be bf16 where a head's decay lies within 2^-8 of 1, which "
            f"rounding to nearest erases: got {len(found)} such heads, the slowest of them head "
            f"{head} of layer {layer} with decay {math.exp(-1 / horizon):.8f} a token (horizon "
            f"{horizon:,.0f} tokens); use fp32, fp16 (stochastic rounding) or int8 (replay ring)"
        )


def _horizons(config: ModelConfig) -> Iterator[list[float]]:
    """Tokens that each head remembers, linear layer by linear layer."""
    H, L = config.num_attention_heads, config.num_hidden_layers
    for layer in linear_layers(config):
        yield (-1 / layer_log_decay(H, layer, L).double()).tolist()


def _by_horizon(horizon: float) -> StateFormat:
    for name, rounding in _ROUNDING.items():
        if rounding <= _LARGEST_ERROR * -math.expm1(-TURN_TOKENS / horizon):
            return name
    return "fp32"
