"""Text in, text out: a checkpoint with its tokenizer, offline."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from tokenizers import Tokenizer

from sevenfold.config import CheckpointError
from sevenfold.engine.decoding import Decoder
from sevenfold.engine.sampling import SamplingParams, choose_token
from sevenfold.engine.text import TextStream
from sevenfold.models import HybridModel
from sevenfold.models.checkpoint import load_model

PREFILL_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Completion:
    """One prompt's output; finish_reason is "stop" for an end-of-sequence token or stop string."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Delta:
    """What one step added to one output; finish_reason is None until its last delta."""

    index: int
    text: str
    token_id: int
    finish_reason: Literal["stop", "length"] | None


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
        cls, path: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> Self:
        """Load a checkpoint directory and the tokenizer.json in it.

        Args:
            path: the directory, in any format that load_model reads.
            device: where to run.
            dtype: of the weights; None keeps the file's.

        Returns:
            The model, ready to generate.

        Raises:
            CheckpointError: the checkpoint or its tokenizer cannot be read.
        """
        if not Path(path).is_dir():
            raise CheckpointError(f"{path} must be a checkpoint folder, got none of that name")
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file} must exist to generate text; copy the tokenizer there")
        model = load_model(Path(path), device=device, dtype=dtype)
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
        reasons: list[Literal["stop", "length"]] = ["length"] * len(prompts)
        for delta in self._deltas(prompt_ids, params, prefill_chunk_tokens):
            tokens[delta.index].append(delta.token_id)
            texts[delta.index] += delta.text
            reasons[delta.index] = delta.finish_reason or "length"
        return [
            Completion(tuple(prompt_ids[n]), tuple(tokens[n]), texts[n], reasons[n])
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
        running = [_Output(n, ids, self.tokenizer, params) for n, ids in enumerate(prompts)]
        logits = decoder.prefill(chunk_tokens).cpu()
        eos = None if params.ignore_eos else self.model.config.eos_token_id
        while True:
            deltas = [out.advance(row, eos) for out, row in zip(running, logits, strict=True)]
            yield from deltas
            alive = [n for n, delta in enumerate(deltas) if delta.finish_reason is None]
            if not alive:
                return
            if len(alive) < len(running):
                decoder.keep(alive)
                running = [running[n] for n in alive]
            logits = decoder.step([out.last_token for out in running]).cpu()


class _Output:
    """One sequence being generated."""

    def __init__(
        self, index: int, prompt: list[int], tokenizer: Tokenizer, params: SamplingParams
    ) -> None:
        self.index, self.params = index, params
        self.text = TextStream(tokenizer, params.stop)
        self.num_tokens, self.last_token = 0, prompt[-1]
        self._seen = set(prompt)
        self._random = torch.Generator("cpu")
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)

    def advance(self, logits: torch.Tensor, eos_token_id: int | None) -> Delta:
        """Choose the next token and say what it added."""
        draw = float(torch.rand((), generator=self._random, dtype=torch.float64))
        seen = torch.tensor(sorted(self._seen))
        token = choose_token(logits, seen, self.params, draw)
        self.last_token = token
        self.num_tokens += 1
        self._seen.add(token)
        if token == eos_token_id:
            return Delta(self.index, self.text.finish(), token, "stop")
        shown = self.text.push(token)
        if self.text.stopped:
            return Delta(self.index, shown, token, "stop")
        if self.num_tokens == self.params.max_tokens:
            shown += self.text.finish()
            reason = "stop" if self.text.stopped else "length"
            return Delta(self.index, shown, token, reason)
        return Delta(self.index, shown, token, None)
