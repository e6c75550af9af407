"""Text in, text out: a checkpoint with its tokenizer, offline."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from tokenizers import Tokenizer

from sevenfold.config import CheckpointError
from sevenfold.engine.decoding import Decoder
from sevenfold.engine.int8_weights import load_int8_model
from sevenfold.engine.sampling import (
    Logprobs,
    Output,
    Sampler,
    SamplingParams,
    read_logprobs,
)
from sevenfold.engine.text import TextStream
from sevenfold.models import HybridModel
from sevenfold.models.accounting import WeightFormat
from sevenfold.models.checkpoint import load_model

PREFILL_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Completion:
    """One prompt's output; finish_reason is "stop" for a token or string that ends it.

    logprobs: one entry for each token, if they were asked for.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[Logprobs, ...] | None


@dataclass(frozen=True)
class Delta:
    """What one step added to one output; finish_reason is None until its last delta."""

    index: int
    text: str
    token_id: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: Logprobs | None


class LLM:
    """A model and its tokenizer, ready to generate."""

    def __init__(self, model: HybridModel, tokenizer: Tokenizer) -> None:
        if tokenizer.get_vocab_size() > model.config.vocab_size:
            raise ValueError(
                f"tokenizer must have at most the model's {model.config.vocab_size} tokens, got "
                f"{tokenizer.get_vocab_size()}"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        weights: WeightFormat | None = None,
    ) -> Self:
        """Load a checkpoint directory and the tokenizer.json in it.

        Args:
            path: the directory, in any format that load_model reads.
            device: where to run.
            dtype: of the weights; None keeps the file's.
            weights: which matrices to quantise to int8 as they are read; None none.

        Returns:
            The model, ready to generate.

        Raises:
            CheckpointError: the checkpoint or its tokenizer cannot be read.
            ConfigError: weights has no effect on the model.
        """
        if not Path(path).is_dir():
            raise CheckpointError(f"{path} must be a checkpoint folder, got none of that name")
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file} must exist to generate text; copy the tokenizer there")
        if weights is None:
            model = load_model(Path(path), device=device, dtype=dtype)
        else:
            model = load_int8_model(Path(path), weights, device=device, dtype=dtype)
        return cls(model, Tokenizer.from_file(str(file)))

    def generate(
        self,
        prompts: Sequence[str],
        params: SamplingParams | None = None,
        *,
        prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> list[Completion]:
        """Complete prompts of any lengths together; each as if it were alone.

        Args:
            prompts: texts.
            params: what to ask of the sampler; None takes its defaults.
            prefill_chunk_tokens: prompt tokens that are run at once: bounds memory, no more.

        Returns:
            One completion for each prompt, in order.

        Raises:
            ValueError: a prompt has no token, or does not fit with max_tokens into the model.
        """
        params = params or SamplingParams()
        prompt_ids = [self._encode(prompt, params) for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        logprobs: list[list[Logprobs]] = [[] for _ in prompts]
        reasons: list[Literal["stop", "length"]] = ["length"] * len(prompts)
        for delta in self._deltas(prompt_ids, params, prefill_chunk_tokens):
            tokens[delta.index].append(delta.token_id)
            texts[delta.index] += delta.text
            logprobs[delta.index] += [] if delta.logprobs is None else [delta.logprobs]
            reasons[delta.index] = delta.finish_reason or "length"
        return [
            Completion(
                tuple(prompt_ids[n]),
                tuple(tokens[n]),
                texts[n],
                reasons[n],
                None if params.logprobs is None else tuple(logprobs[n]),
            )
            for n in range(len(prompts))
        ]

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Complete one prompt, giving its text as it comes, in whole characters.

        Args:
            prompt: the text.
            params: what to ask of the sampler; None takes its defaults.

        Yields:
            One delta for each token; joined, their texts are the completion's text.

        Raises:
            ValueError: as generate.
        """
        params = params or SamplingParams()
        prompt_ids = [self._encode(prompt, params)]
        return self._deltas(prompt_ids, params, PREFILL_CHUNK_TOKENS)

    def _encode(self, prompt: str, params: SamplingParams) -> list[int]:
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        limit = self.model.config.max_position_embeddings
        beyond = [t for t in params.logit_bias if t >= self.model.config.vocab_size]
        if beyond:
            raise ValueError(
                f"logit_bias must name tokens below vocab_size = {self.model.config.vocab_size}, "
                f"got {beyond[0]}"
            )
        if not ids:
            raise ValueError(f"prompt must have at least one token, got {prompt!r}")
        if len(ids) + params.max_tokens > limit:
            raise ValueError(
                f"prompt and max_tokens must fit into max_position_embeddings = {limit} tokens, "
                f"got {len(ids)} + {params.max_tokens}"
            )
        return ids

    def _deltas(
        self, prompts: list[list[int]], params: SamplingParams, chunk_tokens: int
    ) -> Iterator[Delta]:
        if not prompts:
            return
        capacity = max(len(prompt) for prompt in prompts) + params.max_tokens
        decoder = Decoder(self.model, prompts, capacity_tokens=capacity)
        running = [_Running(n, ids, self, params) for n, ids in enumerate(prompts)]
        sampler = self._sampler(running)
        logits = decoder.prefill(chunk_tokens)
        while True:
            tokens = sampler.choose(logits)
            logprobs = read_logprobs(logits, tokens, [params] * len(running))
            rows = zip(running, tokens.tolist(), logprobs, strict=True)
            deltas = [one.advance(token, logprob) for one, token, logprob in rows]
            yield from deltas
            alive = [n for n, delta in enumerate(deltas) if delta.finish_reason is None]
            if not alive:
                return
            if len(alive) < len(running):
                decoder.keep(alive)
                running = [running[n] for n in alive]
                sampler = self._sampler(running)
            logits = decoder.step([one.output.tokens[-1] for one in running])

    def _sampler(self, running: "list[_Running]") -> Sampler:
        outputs = [one.output for one in running]
        return Sampler(outputs, self.model.config.vocab_size, self.model.device)

    def end_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end an output."""
        eos = self.model.config.eos_token_id
        return (*params.stop_token_ids, *(() if params.ignore_eos or eos is None else (eos,)))


class _Running:
    """One sequence being generated."""

    def __init__(self, index: int, prompt: list[int], llm: LLM, params: SamplingParams) -> None:
        self.index, self.params = index, params
        self.text = TextStream(llm.tokenizer, params.stop)
        self.output = Output(params, prompt, llm.end_ids(params))

    def advance(self, token: int, logprobs: Logprobs | None) -> Delta:
        """Take the next token, and say what it added."""
        self.output.tokens.append(token)
        text, reason = self._shown(token)
        return Delta(self.index, text, token, reason, logprobs)

    def _shown(self, token: int) -> tuple[str, Literal["stop", "length"] | None]:
        if token in self.output.end_ids:
            return self.text.finish(), "stop"
        shown = self.text.push(token)
        if self.text.stopped:
            return shown, "stop"
        if len(self.output.tokens) < self.params.max_tokens:
            return shown, None
        shown += self.text.finish()
        return shown, "stop" if self.text.stopped else "length"
