"""Drafts whose accepted tokens a state still lacks: what the next call must fold in."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sevenfold.engine.storage import LinearStorage, Storage
from sevenfold.engine.transfer import upload
from sevenfold.models import HybridModel
from sevenfold.ops import ReplayPool, lightning_attention_commit


class PendingDrafts:
    """Which tokens of its last draft each state took, until they are in its ring or in the state.

    A slot that is not held has a state that lacks nothing. Verification takes what is held along;
    everything else needs whole states and commits first.
    """

    def __init__(self, model: HybridModel, storage: Storage) -> None:
        self._layers: list[tuple[Tensor, ReplayPool]] = []
        for block, stored in zip(model.layers, storage.layers, strict=True):
            drafts = stored.drafts if isinstance(stored, LinearStorage) else None
            if drafts is not None:
                decay = block.get_submodule("self_attn").log_decay  # of this rank's heads
                self._layers.append((decay, drafts))  # pyright: ignore[reportArgumentType]
        self._accepted: dict[int, list[int]] = {}
        self._device = model.device

    def forget(self, slots: Sequence[int]) -> None:
        """Note that slots hold new states: zeros, or a snapshot."""
        for slot in slots:
            self._accepted.pop(slot, None)

    def commit(self, slots: Sequence[int]) -> None:
        """Bring the states of slots up to date."""
        held = {slot: self._accepted.pop(slot) for slot in slots if slot in self._accepted}
        if held:
            self._fold(held)

    def take(self, slots: Sequence[int]) -> list[list[int]]:
        """Return what the slots' next verification must accept; it holds it then."""
        taken = [self._accepted.get(slot, []) for slot in slots]
        self._accepted.update({slot: [] for slot in slots})
        return taken

    def accept(self, slot: int, path: Sequence[int]) -> None:
        """Note which tokens of its verified draft a state takes: their indices, root to last."""
        self._accepted[slot] = list(path)

    def stop(self, slot: int, num_tokens: int) -> None:
        """Bring a state up to date with the first tokens that it took of its draft, and no more.

        It must have been committed before that draft was verified.
        """
        path = self._accepted[slot]
        self._fold({slot: path[:num_tokens]})
        # The rest of the draft stays where it lies, behind no tokens at all.
        self._accepted[slot] = path[num_tokens:]

    def _fold(self, held: Mapping[int, list[int]]) -> None:
        slots = upload(list(held), self._device)
        accepted = accepted_table(list(held.values()), self._device)
        for log_decay, pool in self._layers:
            lightning_attention_commit(log_decay, pool, slots, accepted=accepted)


def accepted_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return which tokens of its draft each sequence took, [N, A] int32, as operators read it."""
    width = max(1, *map(len, rows))
    filled = [index for row in rows for index in (*row, *(-1,) * (width - len(row)))]
    return upload(filled, device).int().view(len(rows), width)
