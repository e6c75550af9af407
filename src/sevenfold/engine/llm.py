"""Text in, text out: a checkpoint on the engine, offline and asynchronous."""

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import cached_property
from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer

from sevenfold.config import check_type, parse_config
from sevenfold.engine.building import EngineOptions
from sevenfold.engine.driving import Driver
from sevenfold.engine.engine import Engine
from sevenfold.engine.grammar import Grammar, GrammarCompiler
from sevenfold.engine.llm_output import Completion, Delta, LLMOutput, join_deltas
from sevenfold.engine.precision import Precision, SnapshotDtype, StateDtype
from sevenfold.engine.prompts import Prompt, prompt_list, prompt_tokens
from sevenfold.engine.request_options import RequestOptions
from sevenfold.engine.sampling import SamplingParams
from sevenfold.engine.speculation import DraftModel, SpeculationConfig, SpeculationCounters
from sevenfold.engine.text_model import TextModel
from sevenfold.models import HybridModel
from sevenfold.models.accounting import WeightFormat


class LLM:
    """A model on a continuous-batching engine with a prefix cache.

    Calls may overlap, from threads and from tasks: whoever waits for a token takes the engine's
    next step, which serves everybody.
    """

    def __init__(
        self,
        source: str | Path | TextModel,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        weights: WeightFormat | None = None,
        states: StateDtype = "fp32",
        snapshots: SnapshotDtype = "fp32",
        memory_bytes: int | None = None,
        context_tokens: int | None = None,
        speculation: SpeculationConfig | None = None,
        draft: DraftModel | None = None,
        tensor_parallel: int = 1,
        host_bytes: int = 0,
        batch_invariant: bool = False,
        warm_up: bool = True,
    ) -> None:
        """Load a checkpoint, allocate the engine's memory, and on a GPU do what happens once.

        Args:
            source: a checkpoint directory with its tokenizer.json, or what TextModel.load returned.
            device: where to run a directory's model; None is "cpu".
            dtype: of a directory's weights; None keeps the file's.
            weights: which matrices to quantise as they are read, and to what: "int8" or "fp8" all
                of the layers', "int8-experts" or "fp8-experts" the experts'; None none.
            states: bits of running requests' states. "fp16" rounds stochastically, "int8" goes
                through a ring of tokens, "bf16" rounds to nearest.
            snapshots: bits of cached states; "auto" keeps more of heads that remember longer.
            memory_bytes: of each rank, for states, keys and values, and cached prefixes, beside the
                weights; None takes a share of what is free. A CPU's memory is taken as it is used.
            context_tokens: what one request must be able to reach; None takes what the model
                allows, or less if the memory holds less.
            speculation: how to guess tokens, several of which one step checks; None guesses none.
                The tokens are the same.
            draft: the smaller model that guesses, with a DraftModelConfig.
            tensor_parallel: ranks that divide a directory's model, each a process of this machine;
                on "cuda" each has a GPU of its own. They end with close, or with this object.
            host_bytes: of the host's memory, of each rank, for cached prefixes that have to make
                room; they come back when they are asked for. 0 keeps none.
            batch_invariant: whether an output, and the bits of its logits, must not depend on what
                else is generated or has been; it costs speed.
            warm_up: whether to compile kernels and record runs now, on a GPU, rather than when a
                prompt first needs them, as pays where there is one short prompt.

        Raises:
            TypeError: an argument is of another type.
            CheckpointError: the checkpoint or its tokenizer cannot be read.
            ConfigError: the memory cannot hold one request of context_tokens, weights has no effect
                on the model, states would erase what a head remembers, draft does not suit
                speculation, or tensor_parallel the model.
            UnsupportedError: the model's dtype cannot be served.
            ValueError: device, dtype, weights or tensor_parallel stands beside a model that is
                loaded.
        """
        kinds = str | Path | TextModel
        rule = "a checkpoint's folder, or a TextModel of model and tokenizer"
        check_type("source", source, kinds, rule)
        check_type("draft", draft, DraftModel | None, "a DraftModel or None")
        bits = {"weights": weights, "states": states, "snapshots": snapshots}
        options = EngineOptions(
            device=device,
            dtype=dtype,
            precision=parse_config(Precision, bits, "LLM"),
            memory_bytes=memory_bytes,
            host_bytes=host_bytes,
            context_tokens=context_tokens,
            speculation=speculation,
            tensor_parallel=tensor_parallel,
            batch_invariant=batch_invariant,
        )
        if not isinstance(source, TextModel):
            source = options.load(source)
        elif (device, dtype, weights, tensor_parallel) != (None, None, None, 1):
            raise ValueError(
                "device, dtype, weights and tensor_parallel must be left out for a model that is "
                "loaded"
            )
        self.model: HybridModel = source.model
        self.tokenizer: Tokenizer = source.tokenizer
        self.plan, limits = options.size(source)
        parts = (self.model, self.tokenizer, self.plan, limits)
        self._ranks = source.ranks
        engine = Engine(*parts, speculation=speculation, draft=draft, ranks=source.ranks)
        if warm_up:
            engine.warm_up()
        self._driver = Driver(engine)
        config = self.model.config
        self._grammars = GrammarCompiler(self.tokenizer, config.vocab_size, config.eos_token_id)
        self._names = count()

    def close(self) -> None:
        """End the other ranks, if there are any; nothing can be generated afterwards."""
        if self._ranks is not None:
            self._ranks.close()

    def speculation_counters(self) -> SpeculationCounters | None:
        """Return what speculation has done so far; None where nothing is guessed."""
        return self._driver.speculation_counters()

    def generate(
        self,
        prompts: str | Iterable[Prompt],
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        options: RequestOptions | None = None,
    ) -> list[Completion]:
        """Complete prompts of any lengths together; each as if it were alone.

        Args:
            prompts: texts or lists of token ids; a text alone is one prompt.
            params: what to ask of the sampler; None takes its defaults.
            grammar: what each output must match; None is any text.
            options: priority, deadline, cache salt, session and marks; None takes their defaults.

        Returns:
            One completion for each prompt, in order.

        Raises:
            TypeError: an argument is of another type, a prompt's token ids among them.
            ValueError: a prompt has no token, does not fit with max_tokens, marks or a session are
                asked for several prompts, or the grammar is wrong.
            RequestFailedError: the model's logits are not finite, nothing can follow in the
                grammar, or the deadline has passed.
        """
        outputs = self._outputs(prompts, params, grammar, options)
        try:
            for output in outputs:
                self._submit(output)
            return [join_deltas(o.request.prompt, list(self._deltas(o))) for o in outputs]
        finally:
            for output in outputs:
                self._driver.leave(output.request.id)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        options: RequestOptions | None = None,
    ) -> Generator[Delta, None, None]:
        """Complete one prompt, giving its text as it comes, in whole characters.

        Closing the iterator cancels the output. Arguments and errors are those of generate; a wrong
        argument raises at once, not with the first token.

        Yields:
            One delta for each token; joined, their texts are the completion's text.
        """
        return self._streamed(self._output(prompt, params, grammar, options))

    async def stream_async(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        options: RequestOptions | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Complete one prompt as stream does, without blocking the event loop.

        Outputs of many tasks run together. Closing the iterator cancels the output.

        Yields:
            One delta for each token.
        """
        output = self._output(prompt, params, grammar, options)
        async with aclosing(self._deltas_async(output)) as deltas:
            async for delta in deltas:
                yield delta

    async def generate_async(
        self,
        prompts: str | Iterable[Prompt],
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        options: RequestOptions | None = None,
    ) -> list[Completion]:
        """Complete prompts as generate does, without blocking the event loop."""

        async def one(output: LLMOutput) -> Completion:
            deltas = [delta async for delta in self._deltas_async(output)]
            return join_deltas(output.request.prompt, deltas)

        outputs = self._outputs(prompts, params, grammar, options)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(output)) for output in outputs]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]

    def _outputs(
        self,
        asked: str | Iterable[Prompt],
        params: SamplingParams | None,
        grammar: Grammar | None,
        options: RequestOptions | None,
    ) -> list[LLMOutput]:
        prompts = prompt_list(asked)
        if isinstance(options, RequestOptions) and len(prompts) > 1:
            own = {"marks": options.marks, "session": options.session}
            for name, value in own.items():
                if value:
                    raise ValueError(
                        f"{name} must be left out for more than one prompt, got {value!r} for "
                        f"{len(prompts)}"
                    )
        return [self._output(prompt, params, grammar, options) for prompt in prompts]

    def _output(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        grammar: Grammar | None,
        options: RequestOptions | None,
    ) -> LLMOutput:
        rule = "a Grammar, of Grammar.json_schema, .regex or .lark, or None"
        check_type("grammar", grammar, Grammar | None, rule)
        check_type("params", params, SamplingParams | None, "one SamplingParams or None")
        check_type("options", options, RequestOptions | None, "a RequestOptions or None")
        params = SamplingParams() if params is None else params
        options = RequestOptions() if options is None else options
        self._check(params)
        ids = self._encode(prompt, params)
        request = options.request(str(next(self._names)), ids, params.max_tokens)
        constraint = None if grammar is None else self._grammars.compile(grammar)
        return LLMOutput(request, params, constraint, options)

    def _encode(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        config = self.model.config
        ids = prompt_tokens(prompt, self.tokenizer, config.vocab_size)
        limit = config.max_position_embeddings
        if len(ids) + params.max_tokens > limit:
            raise ValueError(
                f"prompt and max_tokens must fit into max_position_embeddings = {limit} tokens, "
                f"got {len(ids)} + {params.max_tokens}"
            )
        return ids

    def _check(self, params: SamplingParams) -> None:
        vocab_size = self.model.config.vocab_size
        named = {"logit_bias": params.logit_bias, "stop_token_ids": params.stop_token_ids}
        for name, tokens in named.items():
            beyond = [token for token in tokens if token >= vocab_size]
            if beyond:
                raise ValueError(
                    f"{name} must name tokens below vocab_size = {vocab_size}, got {beyond[0]}"
                )

    def _streamed(self, output: LLMOutput) -> Generator[Delta, None, None]:
        self._submit(output)
        yield from self._deltas(output)

    def _submit(self, output: LLMOutput) -> None:
        self._driver.submit(output.request, output.params, output.constraint)

    def _deltas(self, output: LLMOutput) -> Generator[Delta, None, None]:
        """Each token of an output that was submitted; leaves the engine at the end."""
        try:
            ended = False
            while not ended:
                delta = output.delta(self._driver.next(output.request.id))
                ended = delta.finish_reason is not None
                yield delta
        finally:
            self._driver.leave(output.request.id)

    async def _deltas_async(self, output: LLMOutput) -> AsyncGenerator[Delta, None]:
        """The same for an output that was not submitted yet, without blocking the event loop."""
        loop, name = asyncio.get_running_loop(), output.request.id
        await loop.run_in_executor(self._thread, self._submit, output)
        try:
            ended = False
            while not ended:
                event = self._driver.ready(name)
                if event is None:
                    event = await loop.run_in_executor(self._thread, self._driver.next, name)
                delta = output.delta(event)
                ended = delta.finish_reason is not None
                yield delta
        finally:
            # Not here: it would wait for the step under way.
            self._thread.submit(self._driver.leave, name)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        """Where steps run that asynchronous callers wait for: one thread, as they take turns."""
        return ThreadPoolExecutor(1, thread_name_prefix="sevenfold-llm")
