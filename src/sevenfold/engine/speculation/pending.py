"""Drafts whose accepted tokens a state still lacks: what the next call must fold in."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.engine.rows import Row
from sevenfold.engine.runner import noise_of
from sevenfold.engine.state_drafts import DraftRings
from sevenfold.engine.storage import KVStorage, Storage
from sevenfold.engine.transfer import upload
from sevenfold.models import HybridModel
from sevenfold.ops import ReplayPool, lightning_attention_commit


class _Held(NamedTuple):
    """Tokens of a draft that count, root to last, and what rounds the state after them."""

    path: list[int]
    seed: int
    seen: int


class PendingDrafts:
    """Which tokens of its last draft each state took, until they are in its ring or in the state.

    A slot that is not held has a state that lacks nothing. Verification takes what is held along;
    everything else needs whole states and commits first.
    """

    def __init__(self, model: HybridModel, storage: Storage) -> None:
        # Number among the layers, decays of this rank's heads, states with their rings.
        self._layers: list[tuple[int, Tensor, ReplayPool | DraftRings]] = []
        for n, (block, stored) in enumerate(zip(model.layers, storage.layers, strict=True)):
            if not isinstance(stored, KVStorage) and stored.drafts is not None:
                decay = block.get_submodule("self_attn").log_decay
                self._layers.append((n, decay, stored.drafts))  # pyright: ignore[reportArgumentType]
        rings = [pool for _, _, pool in self._layers]
        self._keeps_tokens = any(isinstance(x, DraftRings) and x.keeps_tokens for x in rings)
        self._accepted: dict[int, _Held] = {}
        self._device = model.device

    def forget(self, slots: Sequence[int]) -> None:
        """Note that slots hold new states: zeros, or a snapshot."""
        for slot in slots:
            self._accepted.pop(slot, None)

    def commit(self, slots: Sequence[int]) -> None:
        """Bring the states of slots up to date."""
        held = {slot: self._accepted.pop(slot) for slot in slots if slot in self._accepted}
        if held:
            self._settle(held)

    def take(self, slots: Sequence[int]) -> list[list[int]]:
        """Return what the slots' next verification must accept; it holds it then."""
        taken = [self._accepted[slot].path if slot in self._accepted else [] for slot in slots]
        self._accepted.update({slot: _Held([], 0, 0) for slot in slots})
        return taken

    def accept(self, row: Row, path: Sequence[int]) -> None:
        """Note which tokens of its verified draft a row's state takes: indices, root to last."""
        if row.state is not None:
            self._accepted[row.state] = _Held(list(path), row.seed, row.past + len(path))

    def stop(self, row: Row, num_tokens: int) -> None:
        """Bring a state up to date with the first tokens that it took of its draft, and no more.

        It must have been committed before that draft was verified.
        """
        if row.state is None:
            return
        path, seed, seen = self._accepted[row.state]
        first, rest = path[:num_tokens], path[num_tokens:]
        self._settle({row.state: _Held(first, seed, seen - len(rest))})
        # The rest of the draft stays where it lies: behind no tokens at all, or behind the first.
        if self._keeps_tokens:
            rest = [node - num_tokens for node in rest]
        self._accepted[row.state] = _Held(rest, seed, seen)

    def _settle(self, held: Mapping[int, _Held]) -> None:
        slots = upload(list(held), self._device)
        paths, seeds, seen = zip(*held.values(), strict=True)
        accepted = accepted_table(paths, self._device)
        for n, log_decay, pool in self._layers:
            if isinstance(pool, ReplayPool):
                lightning_attention_commit(log_decay, pool, slots, accepted=accepted)
            else:
                noise = noise_of(seeds, seen, n, self._device)
                pool.settle(slots, accepted, log_decay, noise)


def accepted_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return which tokens of its draft each sequence took, [N, A] int32, as operators read it."""
    width = max(1, *map(len, rows))
    filled = [index for row in rows for index in (*row, *(-1,) * (width - len(row)))]
    return upload(filled, device).int().view(len(rows), width)
