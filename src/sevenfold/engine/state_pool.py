"""States of one layer in an arena, in the precision of their plan: read and written as fp32."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sevenfold.models import Batch, EncodedState
from sevenfold.models.mixers.lightning import advance_states
from sevenfold.ops import (
    Int8ReplayPool,
    Noise,
    dequantise_rows,
    from_scaled_fp16,
    lightning_attention_replay_int8,
    noise_bits,
    quantise_rows,
    to_scaled_fp16,
)


@dataclass(frozen=True)
class HeadGroup:
    """Some heads of every item: codes [S, h, K, V], and scale [S, h] of fp16, [S, h, K] of int8.

    heads: which of the layer's heads; None is all, in their order.
    """

    heads: tuple[int, ...] | None
    codes: Tensor
    scale: Tensor | None

    def read(self, items: Tensor) -> Tensor:
        """Return items [N] as [N, h, K, V] fp32."""
        codes = self.codes[items]
        if self.scale is None:
            return codes.float()
        if codes.dtype is torch.int8:
            return dequantise_rows(codes, self.scale[items])
        return from_scaled_fp16(codes, self.scale[items])

    def write(self, items: Tensor, states: Tensor, bits: Tensor | None) -> None:
        """Round states [N, h, K, V] fp32 into items [N]: fp16 by bits, else to nearest."""
        if self.scale is None:
            self.codes[items] = states.to(self.codes.dtype)
        elif self.codes.dtype is torch.int8:
            self.codes[items], self.scale[items] = quantise_rows(states)
        else:
            self.codes[items], self.scale[items] = to_scaled_fp16(states, bits)


@dataclass(frozen=True)
class StatePool:
    """All items of one layer; its groups hold each head once."""

    groups: tuple[HeadGroup, ...]

    @property
    def exact(self) -> Tensor | None:
        """The items themselves, [S, H, K, V] fp32, where nothing is rounded."""
        group = self.groups[0]
        return group.codes if len(self.groups) == 1 and group.codes.dtype is torch.float32 else None

    def read(self, items: Tensor) -> Tensor:
        """Return items [N] as [N, H, K, V] fp32: copies."""
        if self.groups[0].heads is None:
            return self.groups[0].read(items)
        parts = [group.read(items) for group in self.groups]
        order = torch.tensor([head for group in self.groups for head in group.heads or ()])
        return torch.cat(parts, dim=1)[:, order.argsort().to(items.device)]

    def write(self, items: Tensor, states: Tensor, noise: Noise | None = None) -> None:
        """Round states [N, H, K, V] fp32 into items [N]; noise rounds fp16 stochastically."""
        bits = None if noise is None else noise_bits(noise, tuple(states.shape[1:]))
        for group in self.groups:
            own = states if group.heads is None else states[:, list(group.heads)]
            group.write(items, own, bits)


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
