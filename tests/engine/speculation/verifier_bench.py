"""Requests in a storage with rings, whose drafts are verified without an engine."""

from collections.abc import Sequence

import torch
from device_helpers import PAGE_TOKENS, Places, new_runner, prompt

from sevenfold.engine.device import DeviceVerifier, DraftLimits
from sevenfold.engine.device.capture import Capture
from sevenfold.engine.memory import plan_memory
from sevenfold.engine.rows import Row
from sevenfold.engine.speculation import RING_TOKENS
from sevenfold.engine.speculation.pending import PendingDrafts
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.engine.speculation.verifier import Checked, DraftRow, Verifier
from sevenfold.engine.storage import Storage
from sevenfold.models import HybridModel

CHAINS = [DraftTree((5, 6, 7), (0, 1, 2)), DraftTree((9,), (0,))]
TREES = [DraftTree((5, 6, 7, 8), (0, 0, 1, 3)), DraftTree((9,), (0,))]


class Bench:
    """A storage with rings, some requests in it, and what verifies their drafts."""

    def __init__(
        self,
        model: HybridModel,
        sizes: Sequence[int],
        trees: Sequence[DraftTree],
        capture: Capture | None = None,
    ) -> None:
        self.model = model
        size = {"context_tokens": 64, "page_tokens": PAGE_TOKENS, "ring_tokens": RING_TOKENS}
        size["kv_element_bytes"] = model.dtype.itemsize
        slab = plan_memory(self.model.config, budget_bytes=1 << 30, **size).layout.slab_bytes
        plan = plan_memory(self.model.config, budget_bytes=26 * slab, **size)
        where = {"device": self.model.device, "dtype": self.model.dtype}
        self.storage = Storage(self.model.config, plan, **where)
        self.pending = PendingDrafts(self.model, self.storage)
        self.places, self.trees = Places(self.storage), trees
        self.runner = new_runner(self.model, self.storage, None)
        parts = (self.model, self.storage, self.pending)
        limits = DraftLimits(8, not all(tree.is_chain for tree in trees))
        how = {"page_tokens": PAGE_TOKENS, "batch_sizes": tuple(sizes)}
        self.device = DeviceVerifier(*parts, limits, capture=capture, **how)
        self.plain = Verifier(*parts, page_tokens=PAGE_TOKENS)

    def start(self, numbers: Sequence[int]) -> list[DraftRow]:
        """Drafts of requests by their numbers, whose prompts the runner has seen."""
        found = []
        for n in numbers:
            where = (self.places.state(n + 1), self.places.pages(n), {})
            self.runner.run([Row(prompt(9 + 4 * n, seed=n), 0, *where)])
            tree = self.trees[n % len(self.trees)]
            found.append(DraftRow.of(Row([7 + n], 9 + 4 * n, *where), tree))
        return found


def real_rows(checked: Checked, drafts: Sequence[DraftRow]) -> torch.Tensor:
    """The logits of the drafts' own nodes."""
    return torch.cat(
        [
            checked.logits[first : first + len(draft.row.tokens)]
            for first, draft in zip(checked.first, drafts, strict=True)
        ]
    )
