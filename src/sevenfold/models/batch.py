"""What the tokens of a batch belong to: one frozen object, built once on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from sevenfold.models.padding import Padding


@dataclass(frozen=True)
class Batch:
    """N sequences, laid out one after another in B rows of T tokens.

    lengths: new tokens of each sequence; they sum to B * T. Either every row is one sequence, or
    B is 1 and the row packs all of them.
    past: tokens of each sequence that its state has seen already.
    positions: [B, T] int64 on the model's device, each token's place in its sequence; in a tree of
        drafts, tokens that exclude each other share one.
    cu_seqlens: [N + 1] int32 on the CPU, or None when every row is one sequence.
    padding: which tokens are padding, that no router counts: sequences of their own; None has none.
    """

    lengths: tuple[int, ...]
    past: tuple[int, ...]
    positions: Tensor
    cu_seqlens: Tensor | None
    padding: Padding | None = field(default=None, kw_only=True)

    @staticmethod
    def rows(
        num_rows: int, num_tokens: int, *, past: Sequence[int] | None = None, device: torch.device
    ) -> "Batch":
        """Every row of [num_rows, num_tokens] is one sequence, after `past` tokens (0 if None)."""
        seen = tuple(past) if past is not None else (0,) * num_rows
        _check_past(seen, num_rows)
        first = torch.tensor(seen, dtype=torch.int64)[:, None]
        positions = first + torch.arange(num_tokens)
        return Batch((num_tokens,) * num_rows, seen, _sent(positions, device), None)

    @staticmethod
    def packed(
        lengths: Sequence[int], *, past: Sequence[int] | None = None, device: torch.device
    ) -> "Batch":
        """One row of sum(lengths) tokens packs sequences that never see each other."""
        if not lengths or min(lengths) < 0:
            raise ValueError(f"lengths must be one or more numbers >= 0, got {list(lengths)}")
        seen = tuple(past) if past is not None else (0,) * len(lengths)
        _check_past(seen, len(lengths))
        spans = [torch.arange(s, s + n) for s, n in zip(seen, lengths, strict=True)]
        borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return Batch(tuple(lengths), seen, _sent(torch.cat(spans)[None], device), borders)

    @staticmethod
    def drafts(
        depths: Sequence[Sequence[int]], *, past: Sequence[int], device: torch.device
    ) -> "Batch":
        """One row packs a draft of each sequence, a chain or a tree, after `past` tokens.

        A token's position is `past` and its depth in the draft: 0 for the first token.
        """
        packed = Batch.packed([len(depth) for depth in depths], past=past, device=device)
        places = [p + d for p, depth in zip(past, depths, strict=True) for d in depth]
        return replace(packed, positions=_sent(torch.tensor([places]), device))

    @property
    def num_sequences(self) -> int:
        """N."""
        return len(self.lengths)

    @cached_property
    def totals(self) -> tuple[int, ...]:
        """Tokens of each sequence, past and new."""
        return tuple(p + n for p, n in zip(self.past, self.lengths, strict=True))

    @property
    def is_step(self) -> bool:
        """Whether every sequence has exactly one new token: decoding."""
        return all(length == 1 for length in self.lengths)


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; from pinned memory, or the copy would wait for all work before it."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


def _check_past(past: tuple[int, ...], num_sequences: int) -> None:
    if len(past) != num_sequences or min(past, default=0) < 0:
        raise ValueError(f"past must be {num_sequences} numbers >= 0, got {list(past)}")
