"""The rules of a batch of requests as tensors, and the choice of a token for each of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sevenfold.engine.sampling.params import SamplingParams
from sevenfold.engine.transfer import upload


@dataclass(frozen=True)
class Rules:
    """What N requests ask, as columns [N, 1] on the logits' device.

    greedy [N] bool; temperature, 1 where greedy; top_k, vocab_size where all are kept; top_p, above
    1 where all are kept; min_p, 0 where all are kept.
    none_truncates: known on the host, so that no batch pays for a rule it lacks.
    """

    greedy: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    none_truncates: bool


def build_rules(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Rules:
    """Lay out the rules of a batch, in one copy; rebuilt when its requests change, not at each
    token."""
    fractions = (
        [p.temperature or 1.0 for p in params],
        # Above 1, so that rounding in the cumulative sum drops nothing.
        [2.0 if p.top_p is None else p.top_p for p in params],
        [p.min_p or 0.0 for p in params],
    )
    # More than all is all; a request may name a number that no int64 holds.
    kept = [min(p.top_k or vocab_size, vocab_size) for p in params]
    counts = (kept, [p.temperature == 0 for p in params])
    numbers = np.concatenate([np.array(fractions).view(np.int64), np.array(counts, np.int64)])
    sent = upload(numbers, device)
    temperature, top_p, min_p = sent[:3, :, None].view(torch.float64).float()
    rules = [(p.top_k, p.top_p, p.min_p) for p in params]
    return Rules(
        greedy=sent[4].bool(),
        temperature=temperature,
        top_k=sent[3][:, None],
        top_p=top_p,
        min_p=min_p,
        none_truncates=all(rule == (None, None, None) for rule in rules),
    )


def choose_tokens(logits: Tensor, rules: Rules, draws: Tensor) -> Tensor:
    """Choose the next token of each sequence; nothing waits for the device.

    The order is temperature, top_k, top_p, min_p; each keeps the most probable tokens.

    Args:
        logits: [N, vocab_size] fp32, penalties and biases applied.
        rules: of the N requests.
        draws: [N] fp64, uniform in [0, 1); picks by the inverse of the cumulative distribution.

    Returns:
        [N] int64.
    """
    best = logits.argmax(-1)
    probabilities, tokens = (
        (logits / rules.temperature).softmax(-1).sort(descending=True, stable=True)
    )
    if not rules.none_truncates:
        probabilities = probabilities * _kept(probabilities, rules)
    cumulative = probabilities.double().cumsum(-1)
    aim = draws[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, aim, right=True)
    # A draw just below 1 may round to the end: the last token that is kept.
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    # A row of NaN keeps no token; what it draws is the caller's to refuse, but it draws something.
    drawn = tokens.gather(-1, torch.minimum(place, last).clamp(min=0)).squeeze(-1)
    return torch.where(rules.greedy, best, drawn)


def _kept(probabilities: Tensor, rules: Rules) -> Tensor:
    """Which of the sorted probabilities stay, [N, vocab_size]; the first always does."""
    rank = torch.arange(probabilities.shape[-1], device=probabilities.device)
    kept = rank < rules.top_k
    among = probabilities * kept
    shares = among / among.sum(-1, keepdim=True)
    kept = kept & (shares.cumsum(-1) - shares < rules.top_p)
    kept = kept & (probabilities >= rules.min_p * probabilities[:, :1])
    return kept | (rank == 0)
