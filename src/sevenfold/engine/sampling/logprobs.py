"""Log probabilities of chosen tokens, and of the most probable ones beside them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Logprobs(NamedTuple):
    """One token's log probability by the model itself, natural; and of the most probable tokens.

    top: (token id, log probability), the most probable first, as many as asked for.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def read_logprobs(
    logits: Tensor, tokens: Tensor, asked: Sequence[int | None]
) -> list[Logprobs | None]:
    """Return the log probabilities that N requests ask for.

    Args:
        logits: [N, vocab_size] fp32, as the model gave them.
        tokens: [N] int64, the chosen ones.
        asked: by each of the N requests: how many of the most probable tokens; None asks nothing.

    Returns:
        One entry for each request, None for one that asks for none.
    """
    most = max((n for n in asked if n is not None), default=None)
    if most is None:
        return [None] * len(asked)
    z = logits.log_softmax(-1)
    chosen = z.gather(-1, tokens[:, None]).squeeze(-1).tolist()
    values, ids = (x.tolist() for x in z.topk(min(most, z.shape[-1]), dim=-1))
    return [
        None
        if n is None
        else Logprobs(chosen[i], tuple(zip(ids[i][:n], values[i][:n], strict=True)))
        for i, n in enumerate(asked)
    ]
