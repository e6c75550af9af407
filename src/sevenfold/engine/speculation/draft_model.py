"""Drafts decoded by a smaller model, from states and keys of its own."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sevenfold.config import ConfigError
from sevenfold.engine.cache import Fresh
from sevenfold.engine.cache.arena import Arena, index_of
from sevenfold.engine.memory import MemoryPlan, plan_memory
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.request import Request
from sevenfold.engine.rows import Row
from sevenfold.engine.runner import Runner
from sevenfold.engine.sampling import Output, Sampler
from sevenfold.engine.speculation.config import DraftModelConfig
from sevenfold.engine.speculation.drafter import Ask, Paths
from sevenfold.engine.storage import LinearStorage, Storage
from sevenfold.engine.warm_up import Reach, first_runs
from sevenfold.models import HybridModel
from sevenfold.ops.compile_together import compiled_together

_PAGE_TOKENS = 64
_STATES = 2  # of the tokens that are known, and of those that are guessed on top


@dataclass(frozen=True)
class DraftModel:
    """A smaller model that guesses for a larger one, with its tokenizer."""

    model: HybridModel
    tokenizer: Tokenizer

    def check_serves(self, model: HybridModel, tokenizer: Tokenizer) -> None:
        """Raise ConfigError unless its tokens are those of another model."""
        ours, theirs = self.tokenizer.get_vocab(), tokenizer.get_vocab()
        if ours != theirs:
            differ = [token for token, at in ours.items() if theirs.get(token) != at]
            shown = repr(differ[0]) if differ else f"{len(ours)} of {len(theirs)} tokens"
            raise ConfigError(
                "the draft model's tokenizer must have the model's tokens under the same ids, got "
                f"another for {shown}"
            )
        sizes = (model.config.vocab_size, self.model.config.vocab_size)
        if sizes[0] != sizes[1]:
            raise ConfigError(
                "the draft model's vocab_size must be the model's, {}, got {}".format(*sizes)
            )


@dataclass
class _Sequence:
    """What the smaller model holds of a request: handles of its arena.

    states: after the num_tokens tokens that it has computed, and a copy to guess on with.
    """

    states: list[int]
    pages: list[int] = field(default_factory=list)
    num_tokens: int = 0


class ModelDrafter:
    """Decodes guesses with a smaller model, by the draws of the request itself.

    The state of known tokens never sees a guess: guesses run on a copy, and write keys behind those
    of known tokens, where the next ones go. So a rejection costs nothing to undo.
    """

    is_free = False

    def __init__(self, config: DraftModelConfig, draft: DraftModel) -> None:
        """Allocate the smaller model's memory.

        Raises:
            ConfigError: memory_bytes cannot hold context_tokens of one request.
        """
        self._config, self._model = config, draft.model
        self._plan = _plan(config, draft.model)
        self._arena = Arena(self._plan.layout)
        where = {"device": draft.model.device, "dtype": draft.model.dtype}
        self._storage = Storage(draft.model.config, self._plan, **where)
        self._runner = Runner(draft.model, self._storage, page_tokens=_PAGE_TOKENS)
        self._sequences: dict[str, _Sequence] = {}

    def warm_up(self, stopped: Callable[[], bool]) -> None:
        """Compile the smaller model's kernels, by runs on memory of nobody."""
        config, has_states = self._config, self._plan.has_states
        reach = Reach(config.context_tokens, config.max_chunk_tokens, _PAGE_TOKENS, has_states)
        runs = first_runs(reach, (), ())
        on_gpu = self._model.device.type == "cuda"
        with compiled_together(stopped) if on_gpu else nullcontext():
            self._run_until(stopped, runs)
        self._run_until(stopped, runs)

    def _run_until(self, stopped: Callable[[], bool], runs: list[list[Row]]) -> None:
        for rows in runs:
            if stopped():
                return
            self._runner.run(rows)

    def read(self, requests: Sequence[Request], num_computed: int) -> None:
        """Nothing: a prompt takes the device's time, and memory that others may need now."""

    def propose(self, asks: Sequence[Ask]) -> list[Paths]:
        """Decode guesses for the requests that there is memory for and that are caught up with."""
        most = max(ask.num_tokens for ask in asks)
        served = [n for n, ask in enumerate(asks) if self._reserve(ask, most)]
        paths: list[Paths] = [[] for _ in asks]
        if not served:
            return paths
        logits = self._catch_up([asks[n] for n in served])
        ready = [i for i, n in enumerate(served) if self._is_caught_up(asks[n])]
        if ready:
            chosen = [asks[served[i]] for i in ready]
            rows = logits[torch.tensor(ready, device=logits.device)]
            for i, found in zip(ready, self._guess(chosen, rows, most), strict=True):
                paths[served[i]] = found
        elif logits.is_cuda:
            # Its time is the guesses', not that of the step which runs behind it.
            torch.cuda.synchronize(logits.device)
        return paths

    def forget(self, request_id: str) -> None:
        """Give a request's memory back."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._arena.release(Tenant.STATE, sequence.states)
            self._arena.release(Tenant.PAGE, sequence.pages)

    def _reserve(self, ask: Ask, most: int) -> bool:
        """Take memory for a request's tokens and so many guesses; False if there is too little."""
        sequence = self._sequences.get(ask.request.id)
        if sequence is None:
            states = self._arena.take(Tenant.STATE, _STATES) if self._plan.has_states else []
            if states is None:
                return False
            sequence = self._sequences[ask.request.id] = _Sequence(states)
            self._storage.zero(Fresh([index_of(state) for state in states], []))
        missing = self._plan.num_pages(ask.request.num_tokens + most) - len(sequence.pages)
        pages = self._arena.take(Tenant.PAGE, missing) if missing > 0 else []
        if pages is None:
            return False
        sequence.pages += pages
        self._storage.zero(Fresh([], [index_of(page) for page in pages]))
        return True

    def _catch_up(self, asks: list[Ask]) -> Tensor:
        """Compute the tokens that are known by now, or the next chunk; logits after the last."""
        rows = []
        for ask in asks:
            sequence = self._sequences[ask.request.id]
            first = sequence.num_tokens
            tokens = ask.request.tokens_between(first, first + self._config.max_chunk_tokens)
            rows.append(self._row(sequence, tokens, first, 0))
            sequence.num_tokens += len(tokens)
        return self._runner.run(rows)

    def _is_caught_up(self, ask: Ask) -> bool:
        return self._sequences[ask.request.id].num_tokens == ask.request.num_tokens

    def _guess(self, asks: list[Ask], logits: Tensor, most: int) -> list[Paths]:
        """Decode `most` guesses for each request, and note what else was likely on the way."""
        sequences = [self._sequences[ask.request.id] for ask in asks]
        self._copy_states(sequences)
        outputs = [_copied(ask.output) for ask in asks]
        sampler = Sampler(outputs, self._model.config.vocab_size, self._model.device)
        chains: list[list[int]] = [[] for _ in asks]
        others: list[Paths] = [[] for _ in asks]
        for step in range(most):
            tokens = sampler.choose(logits).tolist()
            likely = logits.topk(min(asks[0].num_branches, logits.shape[-1]), dim=-1).indices
            for n, (token, near) in enumerate(zip(tokens, likely.tolist(), strict=True)):
                beside = [other for other in near if other != token][: asks[n].num_branches - 1]
                others[n] += [[*chains[n], other] for other in beside]
                chains[n].append(token)
                outputs[n].tokens.append(token)
            if step + 1 < most:
                logits = self._runner.run(
                    [
                        self._row(sequence, [token], sequence.num_tokens + step, -1)
                        for sequence, token in zip(sequences, tokens, strict=True)
                    ]
                )
        return [[chain, *more] for chain, more in zip(chains, others, strict=True)]

    def _row(self, sequence: _Sequence, tokens: Sequence[int], past: int, state: int) -> Row:
        return Row(
            tokens=tokens,
            past=past,
            state=index_of(sequence.states[state]) if sequence.states else None,
            pages=[index_of(page) for page in sequence.pages],
            snapshots={},
        )

    def _copy_states(self, sequences: list[_Sequence]) -> None:
        pairs = [[index_of(state) for state in s.states] for s in sequences if s.states]
        if not pairs:
            return
        known, guessed = torch.tensor(pairs, device=self._model.device).unbind(1)
        for layer in self._storage.layers:
            if isinstance(layer, LinearStorage):
                layer.states[guessed] = layer.states[known]


def _copied(output: Output) -> Output:
    """An output that guesses can be added to, with the same draws."""
    copied = copy(output)
    copied.tokens = list(output.tokens)
    return copied


def _plan(config: DraftModelConfig, model: HybridModel) -> MemoryPlan:
    try:
        plan = plan_memory(
            model.config,
            budget_bytes=config.memory_bytes,
            context_tokens=config.context_tokens,
            page_tokens=_PAGE_TOKENS,
            kv_element_bytes=model.dtype.itemsize,
        )
    except ConfigError as error:
        raise ConfigError(f"memory_bytes is the draft model's budget: {error}") from error
    layout = plan.layout
    states = _STATES if plan.has_states else 0
    pages = plan.num_pages(config.context_tokens)
    needed = layout.num_slabs_for(Tenant.STATE, states) + layout.num_slabs_for(Tenant.PAGE, pages)
    if needed > layout.num_usable_slabs:
        least = (needed + 1) * layout.slab_bytes
        raise ConfigError(
            f"memory_bytes must hold {states} states of the draft model and {pages} pages for "
            f"{config.context_tokens} tokens, which takes {least:,} bytes, got "
            f"{config.memory_bytes:,}"
        )
    return plan
