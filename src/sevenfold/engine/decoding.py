"""Incremental decoding: prompts in by chunks, then one token a step for each sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.models import Batch, HybridModel, empty_state, select_sequences


class Decoder:
    """A model with the cache of the sequences that it is decoding.

    Full layers keep keys and values, windows a ring of them, linear layers their state.
    """

    def __init__(
        self, model: HybridModel, prompts: Sequence[Sequence[int]], *, capacity_tokens: int
    ) -> None:
        """Allocate the cache.

        Args:
            model: in eval mode.
            prompts: token ids of each sequence, at least one each.
            capacity_tokens: length that a sequence may reach, its prompt included.
        """
        if not prompts or not all(prompts):
            raise ValueError("prompts must be one or more, of at least one token each")
        self.model = model
        self._prompts = [list(prompt) for prompt in prompts]
        self._past = [0] * len(prompts)
        self._state = empty_state(
            model.config,
            len(prompts),
            capacity_tokens,
            device=model.device,
            dtype=model.dtype,
        )

    @torch.inference_mode()
    def prefill(self, chunk_tokens: int) -> Tensor:
        """Run all prompts, at most chunk_tokens of each sequence at a time.

        Returns:
            [N, vocab_size] fp32 logits after each prompt's last token.
        """
        last: list[Tensor | None] = [None] * len(self._prompts)
        while any(p < len(prompt) for p, prompt in zip(self._past, self._prompts, strict=True)):
            parts = [
                prompt[past : past + chunk_tokens]
                for past, prompt in zip(self._past, self._prompts, strict=True)
            ]
            lengths = [len(part) for part in parts]
            ids = torch.tensor([[token for part in parts for token in part]])
            batch = Batch.packed(lengths, past=self._past, device=self.model.device)
            hidden = self._run(ids, batch)[0].split(lengths)
            for n, (part, vectors) in enumerate(zip(parts, hidden, strict=True)):
                self._past[n] += len(part)
                if part:
                    last[n] = vectors[-1]
        vectors = torch.stack([vector for vector in last if vector is not None])
        return self.model.logits(vectors)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each sequence; returns [N, vocab_size] fp32 logits after it."""
        device = self.model.device
        batch = Batch.rows(len(tokens), 1, past=self._past, device=device)
        hidden = self._run(torch.tensor(tokens)[:, None], batch)
        self._past = [past + 1 for past in self._past]
        return self.model.logits(hidden[:, 0])

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all but some sequences, which keep their order."""
        chosen = torch.tensor(sequences, device=self.model.device)
        self._state = select_sequences(self._state, chosen)
        self._past = [self._past[n] for n in sequences]

    def _run(self, ids: Tensor, batch: Batch) -> Tensor:
        result = self.model.hidden(ids.to(self.model.device), batch, self._state)
        if result.state is None:
            raise AssertionError("a state that went in comes out")
        self._state = result.state
        return result.hidden
