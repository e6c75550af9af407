"""What a layer carries from one call to the next: a value, handed in and handed out.

Whoever allocates it owns it. Storage that sequences share (PooledState, PagedKV), and KVState's, is
written in place, so the value that went into a call must not be used again after it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sevenfold.models.batch import Batch
from sevenfold.models.config import LayerType, ModelConfig
from sevenfold.models.drafts import DraftedState
from sevenfold.ops import PaddedSnapshots, Snapshots


@dataclass(frozen=True)
class LinearState:
    """kv [N, H, K, V] fp32: the state of lightning attention after the last token."""

    kv: Tensor


@dataclass(frozen=True)
class KVState:
    """Keys and values [N, S, G, D] of softmax attention.

    Full attention keeps the token at position p in place p; a window is a ring: place p % S.
    """

    k: Tensor
    v: Tensor

    @property
    def num_places(self) -> int:
        """S."""
        return self.k.shape[1]


@dataclass(frozen=True)
class PooledState:
    """States of lightning attention in a pool [S, H, K, V] fp32: sequence n's in slots[n].

    slots: [N] int64 on the pool's device, no two alike.
    kept: states to keep on the way, by the sequences' order. With it states are advanced where they
        lie, by kernels that take slots; without it they are taken out and put back. Padded ones say
        how many tokens of the batch's one row count, too.
    before: [N, H, K, V] what the sequences' states hold, where it lies in their order elsewhere:
        read in place of them.
    """

    pool: Tensor
    slots: Tensor
    kept: Snapshots | PaddedSnapshots | None = None
    before: Tensor | None = None

    def read(self) -> Tensor:
        """The sequences' states [N, H, K, V], in their order."""
        return self.pool[self.slots] if self.before is None else self.before


class EncodedState(ABC):
    """States of lightning attention in a precision that only their owner knows."""

    @abstractmethod
    def advance(self, tokens: Sequence[Tensor], log_decay: Tensor, batch: Batch) -> Tensor:
        """Run a batch's tokens, and keep the states after them.

        Args:
            tokens: q, k [B, T, H, K] and v [B, T, H, V].
            log_decay: [H] fp32.
            batch: what they belong to; sequence n's state is the n-th.

        Returns:
            o, of as many elements as v, in their order.
        """


@dataclass(frozen=True)
class PageTable:
    """Where the tokens of a batch's sequences lie in pages; one for all layers.

    pages: [N, M] int64, sequence n's pages in the order of its tokens; unused ones are any page.
    page, place: [tokens] int64, where each new token goes.
    key_lengths: [N] int64 beside the pages, each sequence's tokens, for kernels that read lengths
        on a device; None has them read from the batch, on the host.
    cu_seqlens: [N + 1] int64 beside key_lengths, cumulative numbers of new tokens, where they are
        packed in one row.
    past: beside key_lengths, tokens of each sequence before the new ones, where the host knows them
        and a prompt's bits may depend on how it is cut: long chunks may then go block by block.
    """

    pages: Tensor
    page: Tensor
    place: Tensor
    key_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    past: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of softmax attention in pages [P, page_tokens, G, D]."""

    k: Tensor
    v: Tensor
    table: PageTable


@dataclass(frozen=True)
class PagedTree:
    """Keys and values in pages, as PagedKV, of which the new tokens are trees.

    ancestors: [N, T, T] bool; draft token t of sequence n lies in place past[n] + t, and is among
        the last T of the sequence's keys where the table has key_lengths.
    """

    k: Tensor
    v: Tensor
    table: PageTable
    ancestors: Tensor


OwnState = LinearState | KVState
LayerState = OwnState | PooledState | PagedKV | EncodedState | DraftedState | PagedTree


def empty_state(
    config: ModelConfig,
    num_sequences: int,
    capacity_tokens: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[OwnState, ...]:
    """Allocate the state of N sequences before their first token, zeroed.

    Args:
        config: the model.
        num_sequences: N.
        capacity_tokens: tokens that a sequence may reach, which full attention needs room for.
        device: where the model runs.
        dtype: of keys and values: the model's; the linear state is fp32 (fp64 for an fp64 model).

    Returns:
        One value for each layer.
    """
    return tuple(
        empty_layer_state(
            config, layer_type, num_sequences, capacity_tokens, device=device, dtype=dtype
        )
        for layer_type in config.layer_types
    )


def select_sequences(state: tuple[LayerState, ...], sequences: Tensor) -> tuple[LayerState, ...]:
    """Copy the state of some sequences.

    Args:
        state: of N sequences.
        sequences: [M] int64 indices.

    Returns:
        The state of M sequences.
    """
    return tuple(_selected(layer, sequences) for layer in state)


def _selected(layer: LayerState, sequences: Tensor) -> LayerState:
    match layer:
        case LinearState():
            return LinearState(layer.kv[sequences])
        case KVState():
            return KVState(layer.k[sequences], layer.v[sequences])
        case PooledState():
            before = None if layer.before is None else layer.before[sequences]
            return PooledState(layer.pool, layer.slots[sequences], before=before)
        case PagedKV() | PagedTree() | EncodedState() | DraftedState():
            got = type(layer).__name__
            raise TypeError(f"state must own its tensors to be selected from, got {got}")


def empty_layer_state(
    config: ModelConfig,
    layer_type: LayerType,
    num_sequences: int,
    capacity_tokens: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> OwnState:
    """Allocate one layer's part of empty_state; the arguments are the same."""
    D = config.head_dim
    if layer_type == "linear_attention":
        shape = (num_sequences, config.num_attention_heads, D, D)
        state_dtype = torch.promote_types(dtype, torch.float32)
        return LinearState(torch.zeros(shape, device=device, dtype=state_dtype))
    places = capacity_tokens
    if layer_type == "sliding_attention" and config.sliding_window is not None:
        places = config.sliding_window
    shape = (num_sequences, places, config.num_key_value_heads, D)
    k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
    return KVState(k, v)
