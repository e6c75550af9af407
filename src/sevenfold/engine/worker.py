"""A model and its memory: all that a step does to them, asked for by indices and token ids."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from sevenfold.config import StrictModel
from sevenfold.engine.cache import Fresh
from sevenfold.engine.device import DeviceRunner
from sevenfold.engine.invariant import InvariantRunner
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.rows import Row
from sevenfold.engine.runners import make_runner, make_verifier
from sevenfold.engine.speculation.pending import PendingDrafts
from sevenfold.engine.speculation.verifier import Checked, DraftRow
from sevenfold.engine.storage import Storage
from sevenfold.models import HybridModel

Count = Annotated[int, Field(ge=1)]


class WorkerConfig(StrictModel):
    """How a model is run.

    max_running: rows of a decoding step at most.
    decode_batch_sizes: rows of steps that a GPU records as graphs; None takes
        device.decode_batch_sizes, and none records nothing, prefills neither.
    draft_tokens: guesses that are checked for a request at a time, at most; 0 checks none.
    draft_trees: whether guesses may be more than a chain.
    chunk_tokens: run each request so that its bits do not depend on others, its prompt in chunks
        that end at multiples of these; None runs together what pays.
    """

    max_running: Count
    decode_batch_sizes: tuple[int, ...] | None = None
    draft_tokens: Annotated[int, Field(ge=0)] = 0
    draft_trees: bool = False
    chunk_tokens: Count | None = None


class Worker:
    """Does what an engine decides. It decides nothing: ranks that are told the same stay alike.

    ahead: runs tokens that are on the device alone; None where that cannot be done.
    """

    ahead: DeviceRunner | None

    def __init__(self, model: HybridModel, plan: MemoryPlan, config: WorkerConfig) -> None:
        """Allocate the plan's memory.

        Args:
            model: on its device; put into eval mode.
            plan: of its config, with kv_element_bytes of its dtype.
            config: how to run it.

        Raises:
            ConfigError: decode_batch_sizes do not suit the device or the model.
            UnsupportedError: the model's dtype cannot be served.
        """
        self.model = model.eval()
        where = {"device": model.device, "dtype": model.dtype}
        self.storage = Storage(model.config, plan, decays=_decays(model), **where)
        limits = (plan.page_tokens, config.max_running)
        invariant = config.chunk_tokens is not None
        sizes = config.decode_batch_sizes
        self.runner = make_runner(model, self.storage, limits, sizes, invariant=invariant)
        self._run = self.runner.run
        self.ahead = self.runner if isinstance(self.runner, DeviceRunner) else None
        if config.chunk_tokens is not None:
            alone = InvariantRunner(self.runner, config.chunk_tokens)
            self._run = alone.run
            self.ahead = self.ahead if alone.pads else None
        self._pending = PendingDrafts(model, self.storage)
        self._verifier = None
        if config.draft_tokens:
            drafts = (config.draft_tokens + 1, config.draft_trees)
            self._verifier = make_verifier(self.runner, self._pending, drafts)

    def prepare(self, fresh: Fresh) -> None:
        """Clear or fill items that were handed out, before anything reads them."""
        self.storage.save(fresh.saved)
        self.storage.zero(fresh)
        self.storage.load(fresh.loaded)
        self._pending.forget(fresh.states)

    def restore(self, snapshots: Sequence[int], states: Sequence[int]) -> None:
        """Read states from snapshots."""
        self.storage.restore(snapshots, states)
        self._pending.forget(states)

    def run(self, rows: Sequence[Row]) -> Tensor:
        """Run new tokens of N requests, one or more, and write their snapshots.

        Returns:
            [N, vocab_size] fp32, the logits after each row's last token; the next run may overwrite
            it.
        """
        self._pending.commit([row.state for row in rows if row.state is not None])
        return self._run(rows)

    def snapshot(self, states: Sequence[int], snapshots: Sequence[int]) -> None:
        """Write states into snapshots."""
        self.storage.snapshot(states, snapshots)

    def check(self, drafts: Sequence[DraftRow]) -> Checked:
        """Run drafts of N requests, one or more, from the states before them."""
        return self._checked().run(drafts)

    def accept(
        self,
        accepted: Sequence[tuple[DraftRow, Sequence[int]]],
        *,
        rejected: Sequence[DraftRow],
    ) -> None:
        """Take the nodes of drafts that were right, root to last; clear those not finite."""
        verifier = self._checked()
        verifier.accept(accepted)
        verifier.reject(rejected)

    def _checked(self):
        if self._verifier is None:
            raise ValueError("draft_tokens must be 1 or more to check drafts, got 0")
        return self._verifier


def _decays(model: HybridModel) -> list[Tensor]:
    """Of the heads that this rank has, each linear layer's."""
    mixers = [block.get_submodule("self_attn") for block in model.layers]
    decays = [getattr(mixer, "log_decay", None) for mixer in mixers]
    return [decay for decay in decays if decay is not None]
