"""Log probabilities of a prompt's own tokens, read while its prefill computes them."""

from collections.abc import Sequence

from torch import Tensor

from sevenfold.engine.rows import Row
from sevenfold.engine.sampling import read_logprobs
from sevenfold.engine.transfer import upload
from sevenfold.models import HybridModel

_TOKENS_AT_ONCE = 1024  # all logits of a chunk would not fit


def score_rows(model: HybridModel, rows: Sequence[Row], hidden: Tensor) -> None:
    """Read the log probabilities that rows ask for, by the model's logits.

    Args:
        model: whose logits.
        rows: those that ran.
        hidden: [tokens, hidden_size], of all tokens of the rows, one row after another.
    """
    at = 0
    for row in rows:
        if row.scored is not None:
            targets = row.scored.targets
            for first in range(0, len(targets), _TOKENS_AT_ONCE):
                some = targets[first : first + _TOKENS_AT_ONCE]
                logits = model.logits(hidden[at + first : at + first + len(some)])
                chosen = upload(some, logits.device)
                found = read_logprobs(logits, chosen, [row.scored.num_top] * len(some))
                row.scored.found.extend(one for one in found if one is not None)
        at += len(row.tokens)
