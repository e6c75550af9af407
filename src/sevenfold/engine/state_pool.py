"""States of one layer in an arena, in the precision of their plan: read and written as fp32."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sevenfold.models import Batch, EncodedState
from sevenfold.models.mixers.lightning import advance_states
from sevenfold.ops import (
    EncodedHeads,
    Int8ReplayPool,
    Noise,
    ScaledFp16,
    decode_states,
    encode_states,
    lightning_attention_decode_fp16,
    lightning_attention_replay_int8,
)


@dataclass(frozen=True)
class HeadGroup:
    """Some heads of every item: codes [S, h, K, V], and scale [S, h] of fp16, [S, h, K] of int8.

    heads: which of the layer's heads; None is all, in their order.
    """

    heads: tuple[int, ...] | None
    codes: Tensor
    scale: Tensor | None

    @cached_property
    def held(self) -> EncodedHeads:
        """As the operators take them, which heads on their device."""
        heads = None if self.heads is None else torch.tensor(self.heads, device=self.codes.device)
        return EncodedHeads(self.codes, self.scale, heads)


@dataclass(frozen=True)
class StatePool:
    """All items of one layer; its groups hold each head once."""

    groups: tuple[HeadGroup, ...]

    @property
    def exact(self) -> Tensor | None:
        """The items themselves, [S, H, K, V] fp32, where nothing is rounded."""
        group = self.groups[0]
        return group.codes if len(self.groups) == 1 and group.codes.dtype is torch.float32 else None

    @property
    def scaled_fp16(self) -> ScaledFp16 | None:
        """The items as they are decoded in place, where all heads are fp16."""
        group = self.groups[0]
        is_fp16 = len(self.groups) == 1 and group.codes.dtype is torch.float16
        return ScaledFp16(group.codes, group.scale) if is_fp16 and group.scale is not None else None

    def read(self, items: Tensor) -> Tensor:
        """Return items [N] as [N, H, K, V] fp32: copies."""
        heads = sum(group.codes.shape[1] for group in self.groups)
        shape = (len(items), heads, *self.groups[0].codes.shape[2:])
        states = torch.empty(shape, device=items.device)
        self.copy_to(states, _in_order(items), items)
        return states

    def copy_to(self, states: Tensor, slots: Tensor, items: Tensor) -> None:
        """Write items [N] into slots [N] of states [S, H, K, V] fp32."""
        for group in self.groups:
            decode_states(group.held, items, states, slots)

    def write(self, items: Tensor, states: Tensor, noise: Noise | None = None) -> None:
        """Round states [N, H, K, V] fp32 into items [N]; noise rounds fp16 stochastically."""
        self.copy_from(states, _in_order(items), items, noise)

    def copy_from(
        self, states: Tensor, slots: Tensor, items: Tensor, noise: Noise | None = None
    ) -> None:
        """Round slots [N] of states [S, H, K, V] fp32 into items [N]."""
        for group in self.groups:
            encode_states(states, slots, group.held, items, noise=noise)


def _in_order(items: Tensor) -> Tensor:
    return torch.arange(len(items), device=items.device)


class ActiveStates(ABC):
    """States of running requests, in less than fp32."""

    @abstractmethod
    def read(self, slots: Tensor) -> Tensor:
        """Return the states after every token so far, [N, H, K, V] fp32."""

    @abstractmethod
    def write(self, slots: Tensor, states: Tensor) -> None:
        """Round states [N, H, K, V] fp32 into slots, to nearest."""

    @abstractmethod
    def at(self, slots: Tensor, noise: Noise) -> EncodedState:
        """Return what the model advances: the states of a batch's sequences."""


@dataclass(frozen=True)
class RoundedStates(ActiveStates):
    """bf16 to nearest, or fp16 stochastically: rounded after every run of the model."""

    pool: StatePool

    def read(self, slots: Tensor) -> Tensor:
        """Return the states [N, H, K, V] fp32."""
        return self.pool.read(slots)

    def write(self, slots: Tensor, states: Tensor) -> None:
        """Round states into slots, to nearest."""
        self.pool.write(slots, states)

    def at(self, slots: Tensor, noise: Noise) -> EncodedState:
        """Return the states of a batch's sequences."""
        return _RoundedBatch(self.pool, slots, noise)


@dataclass(frozen=True)
class RingStates(ActiveStates):
    """int8 behind a ring of exact tokens: quantised after a prefill's chunk, then once a ring."""

    pool: Int8ReplayPool
    log_decay: Tensor

    def read(self, slots: Tensor) -> Tensor:
        """Return the states with the tokens of their rings, [N, H, K, V] fp32."""
        return self.pool.read(slots, self.log_decay)

    def write(self, slots: Tensor, states: Tensor) -> None:
        """Quantise states into slots, whose rings are empty from then on."""
        self.pool.write(slots, states)

    def at(self, slots: Tensor, noise: Noise) -> EncodedState:
        """Return the states of a batch's sequences; rounding to nearest needs no noise."""
        return _RingBatch(self, slots)


@dataclass(frozen=True)
class _RoundedBatch(EncodedState):
    pool: StatePool
    slots: Tensor
    noise: Noise

    def advance(self, tokens: Sequence[Tensor], log_decay: Tensor, batch: Batch) -> Tensor:
        in_place = self.pool.scaled_fp16
        if batch.is_step and in_place is not None:
            q, k, v = (x.flatten(0, 1) for x in tokens)  # [N, H, D]
            return lightning_attention_decode_fp16(
                q, k, v, log_decay, in_place, self.slots, self.noise
            )
        o, states = advance_states(tokens, log_decay, batch, self.pool.read(self.slots))
        self.pool.write(self.slots, states, self.noise)
        return o


@dataclass(frozen=True)
class _RingBatch(EncodedState):
    states: RingStates
    slots: Tensor

    def advance(self, tokens: Sequence[Tensor], log_decay: Tensor, batch: Batch) -> Tensor:
        if batch.is_step:
            q, k, v = (x.flatten(0, 1) for x in tokens)  # [N, H, D]
            pool = self.states.pool
            return lightning_attention_replay_int8(q, k, v, log_decay, pool, self.slots)
        o, states = advance_states(tokens, log_decay, batch, self.states.read(self.slots))
        self.states.write(self.slots, states)
        return o
