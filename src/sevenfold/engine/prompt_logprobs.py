"""Log probabilities of a prompt's own tokens."""

from collections.abc import Sequence

import torch

from sevenfold.engine.sampling import Logprobs, SamplingParams, read_logprobs
from sevenfold.models import Batch, HybridModel, empty_state

_CHUNK_TOKENS = 1024  # at once: all logits of a long prompt would not fit


@torch.inference_mode()
def prompt_logprobs(
    model: HybridModel, prompt: Sequence[int], num_top: int
) -> tuple[Logprobs, ...]:
    """Run a prompt by itself, beside the engine's memory, and read each token's log probability.

    A prefix cache holds states, not logits, so nothing of it helps here.

    Args:
        model: in eval mode.
        prompt: token ids, one or more.
        num_top: how many of the most probable tokens to give beside each.

    Returns:
        One entry for each token after the first.
    """
    device, asked = model.device, SamplingParams(logprobs=num_top)
    state = empty_state(model.config, 1, len(prompt), device=device, dtype=model.dtype)
    ids = torch.tensor(prompt, device=device)
    found: list[Logprobs | None] = []
    for first in range(0, len(prompt) - 1, _CHUNK_TOKENS):
        last = min(first + _CHUNK_TOKENS, len(prompt) - 1)
        batch = Batch.rows(1, last - first, past=(first,), device=device)
        hidden, after, _ = model.hidden(ids[None, first:last], batch, state)
        state = state if after is None else after
        chosen = ids[first + 1 : last + 1]
        found += read_logprobs(model.logits(hidden[0]), chosen, [asked] * (last - first))
    return tuple(one for one in found if one is not None)
