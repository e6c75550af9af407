"""A model and its memory: all that a step does to them, asked for by indices and token ids."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Annotated, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from sevenfold.config import StrictModel
from sevenfold.engine.cache import Fresh
from sevenfold.engine.device import CudaCapture, DeviceRunner, Stepped, draft_token_sizes
from sevenfold.engine.invariant import InvariantRunner
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.rows import NextRow, Row
from sevenfold.engine.runner import Runner
from sevenfold.engine.runners import make_runner, make_verifier
from sevenfold.engine.speculation.pending import PendingDrafts
from sevenfold.engine.speculation.verifier import Checked, DraftRow, Verifier
from sevenfold.engine.storage import Storage
from sevenfold.engine.warm_up import Reach, WarmUpStoppedError, first_drafts, first_runs
from sevenfold.models import HybridModel
from sevenfold.ops.compile_together import compiled_together

Count = Annotated[int, Field(ge=1)]
Note = Callable[[str], None]


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


class Prefilled(NamedTuple):
    """What a prompt's chunk gave: fields as Stepped's, but for the choice, which may be unknown."""

    logits: Tensor
    best: Tensor | None


class RunsAhead(Protocol):
    """Runs the next tokens of requests before they have come to the host; see DeviceRunner."""

    def num_step_rows(self, needed: int) -> int:
        """Return how many rows a decoding step of as many requests computes."""
        ...

    def run_ahead(self, rows: Sequence[NextRow | None], tokens: Tensor) -> Stepped:
        """Run rows whose tokens [N] are on the device."""
        ...


class Worker:
    """Does what an engine decides. It decides nothing: ranks that are told the same stay alike.

    ahead: runs tokens that are on the device alone; None where that cannot be done.
    """

    ahead: RunsAhead | None

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
        self._config, self.is_stopping = config, False
        alone = self._alone(self.runner)
        self._run = alone.run
        # What rounds a state goes by a seed that tokens on the device alone come without.
        can_lead = alone.pads if isinstance(alone, InvariantRunner) else self.storage.is_exact
        self.ahead = self.runner if isinstance(self.runner, DeviceRunner) and can_lead else None
        self._pending = PendingDrafts(model, self.storage)
        self._verifier = None
        if config.draft_tokens:
            drafts = (config.draft_tokens + 1, config.draft_trees)
            self._verifier = make_verifier(self.runner, self._pending, drafts)

    @property
    def has_first_times(self) -> bool:
        """Whether something happens once, when it is first needed: on a GPU."""
        return isinstance(self.runner, DeviceRunner) or self.model.device.type == "cuda"

    def warm_up(self, most_tokens: int, chunk_tokens: int, note: Note) -> None:
        """Compile kernels, and run and record what requests will need, on memory of nobody.

        On a CPU checks of drafts alone, whose loops take seconds to compile: a request without a
        draft comes through all others.

        Args:
            most_tokens: of a request.
            chunk_tokens: of a prompt that are computed at once, at most.
            note: told how far it is.

        Raises:
            WarmUpStoppedError: stop_warm_up was called.
        """
        began_s = time.monotonic()
        reach = Reach(most_tokens, chunk_tokens, self.runner.page_tokens, self.storage.has_states)
        if not self.has_first_times:
            if self._verifier is not None:
                self._check_first(self._verifier, first_drafts(reach, (2,))[-1])
                note(f"the check of drafts ready after {time.monotonic() - began_s:.1f} s")
            return
        runs, drafts = self._first_runs(reach), self._first_drafts(reach)
        num_kernels = self._rehearse(runs, drafts)
        note(f"{num_kernels} kernels compiled after {time.monotonic() - began_s:.1f} s")
        for rows in runs:
            self._check_wanted()
            self._run(rows)
        for rows in drafts:
            self._check_wanted()
            self._checked().run(rows)
        self._pending.forget([SINK])
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
            torch.cuda.empty_cache()
        seconds = time.monotonic() - began_s
        note(f"{len(runs) + len(drafts)} sizes of runs ready after {seconds:.1f} s")

    def _check_first(self, verifier: Verifier, drafts: list[DraftRow]) -> None:
        """Check drafts on the sink, and take what they gave along, into a ring and into a state."""
        for _ in range(2):
            self._check_wanted()
            verifier.run(drafts)
            verifier.accept([(draft, [0]) for draft in drafts])
        self._check_wanted()
        self._pending.commit([SINK])

    def stop_warm_up(self) -> None:
        """End a warm-up before its next run; called by any thread, or by a signal's handler."""
        self.is_stopping = True

    def _check_wanted(self) -> None:
        if self.is_stopping:
            raise WarmUpStoppedError("the engine was told to stop before it was warm")

    def _first_runs(self, reach: Reach) -> list[list[Row]]:
        if not isinstance(self.runner, DeviceRunner):
            return first_runs(reach, (), ())
        sizes = self.runner.batch_sizes if self.runner.capture is not None else ()
        return first_runs(reach, sizes, self.runner.prefill_sizes)

    def _first_drafts(self, reach: Reach) -> list[list[DraftRow]]:
        if self._verifier is None:
            return []
        return first_drafts(reach, draft_token_sizes(self._config.draft_tokens + 1))

    def _rehearse(self, runs: list[list[Row]], drafts: list[list[DraftRow]]) -> int:
        """Compute everything once where no kernel is launched: how many had to be compiled."""
        on_gpu = self.model.device.type == "cuda"
        together = compiled_together(lambda: self.is_stopping) if on_gpu else nullcontext([])
        with together as compilation:
            for rows in runs:
                self._check_wanted()
                # Each time another one, which takes what it allocates along.
                self._alone(self.runner.rehearsal()).run(rows)
            for rows in drafts:
                self._check_wanted()
                self._checked().rehearsal().run(rows)
        self._check_wanted()
        return len(compilation)

    def _alone(self, runner: Runner | DeviceRunner) -> Runner | DeviceRunner | InvariantRunner:
        """What runs rows by a runner: each for itself, where bits must not depend on company."""
        chunk_tokens = self._config.chunk_tokens
        return runner if chunk_tokens is None else InvariantRunner(runner, chunk_tokens)

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

    def prefill(self, fresh: Fresh, restored: Sequence[tuple[int, int]], row: Row) -> Prefilled:
        """Prepare items, restore states from snapshots, pairs of both, and run one row of a prompt.

        In one launch, where it is recorded: each other takes the host as long as to write the row.

        Returns:
            Logits as run's, and the choice where it is known.
        """
        if isinstance(self.runner, DeviceRunner) and self._config.chunk_tokens is None:
            snapshot = restored[0][0] if restored else None
            stepped = self.runner.run_readied(row, fresh, snapshot)
            if stepped is not None:
                return Prefilled(*stepped)
        return self._prefill(fresh, restored, row)

    def _prefill(self, fresh: Fresh, restored: Sequence[tuple[int, int]], row: Row) -> Prefilled:
        self.prepare(fresh)
        self.restore([a for a, _ in restored], [b for _, b in restored])
        return Prefilled(self.run([row]), None)

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

    def close(self) -> None:
        """Let go of what was recorded; nothing runs afterwards."""
        capture = self.runner.capture if isinstance(self.runner, DeviceRunner) else None
        if isinstance(capture, CudaCapture):
            capture.release()

    def _checked(self) -> Verifier:
        if self._verifier is None:
            raise ValueError("draft_tokens must be 1 or more to check drafts, got 0")
        return self._verifier


def _decays(model: HybridModel) -> list[Tensor]:
    """Of the heads that this rank has, each linear layer's."""
    mixers = [block.get_submodule("self_attn") for block in model.layers]
    decays = [getattr(mixer, "log_decay", None) for mixer in mixers]
    return [decay for decay in decays if decay is not None]
