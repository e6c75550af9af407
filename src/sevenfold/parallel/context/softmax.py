"""Softmax attention over a row that several ranks hold: keys and values are gathered.

With grouped queries keys are few (two heads in sixteen in MiniMax-Text-01), and each piece of a
document reads its own document's keys only.
"""

import torch
from torch import Tensor
from torch import distributed as dist

from sevenfold.models import Batch
from sevenfold.models.state import KVState, PagedKV, PagedTree
from sevenfold.ops import attention_cached
from sevenfold.parallel.collectives import gather_tokens
from sevenfold.parallel.context.batch import stretch_of


class ContextSoftmax:
    """Stands in for SoftmaxAttention.attend on a context rank."""

    def __init__(self, scale: float, window: int | None, group: dist.ProcessGroup) -> None:
        """Args: scale and window of the layer; group of the context ranks."""
        self.scale, self.window, self.group = scale, window, group

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        state: KVState | PagedKV | PagedTree | None,
    ) -> Tensor:
        """Attend q [1, T, H, D] to the keys of its documents, wherever they lie."""
        stretch = stretch_of(batch, state)
        keys, values = k[0], v[0]
        first = stretch.first_token
        if stretch.crosses:
            keys, values = gather_tokens(torch.cat([keys, values], -1), self.group).chunk(2, -1)
        else:
            first = 0
        parts, at = [], 0
        for past, length in zip(stretch.past, stretch.lengths, strict=True):
            span = slice(first + at - past, first + at + length)
            parts.append(
                attention_cached(
                    q[:, at : at + length],
                    keys[None, span],
                    values[None, span],
                    lengths=(length,),
                    key_lengths=(past + length,),
                    scale=self.scale,
                    window=self.window,
                )
            )
            at += length
        return torch.cat(parts, 1)
