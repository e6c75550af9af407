"""Softmax attention of recomputed blocks runs once: its result is kept for the second run."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sevenfold.models import Batch
from sevenfold.models.mixers import SoftmaxAttention
from sevenfold.ops import KeptResult, attention_kept, suits_keeping

Attend = Callable[..., Tensor]


@runtime_checkable
class _Keeps(Protocol):
    """What attends on a rank that holds a part of a row."""

    def attend_kept(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, kept: KeptResult
    ) -> Tensor: ...


class KeptAttention:
    """Stands in for SoftmaxAttention.attend of a block that is run again in the backward.

    Of a token it keeps H * V values and H numbers of fp32 from the first run to the second.
    """

    def __init__(self, mixer: SoftmaxAttention) -> None:
        """Take over what attends in a mixer without a window."""
        self._attend: Attend = mixer.attend
        self._scale = mixer.scale
        self._kept: KeptResult | None = None

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return what a block's first run happens in, and its second: torch's context_fn."""
        kept = KeptResult()
        return self._within(kept), self._within(kept)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, state: Any) -> Tensor:
        """Attend q [B, T, H, D] to keys, or give what the first run gave."""
        if self._kept is None:
            return self._attend(q, k, v, batch, state)
        if isinstance(self._attend, _Keeps):
            return self._attend.attend_kept(q, k, v, batch, self._kept)
        if not suits_keeping(q, v, batch.lengths):
            return self._attend(q, k, v, batch, state)
        how = {"lengths": batch.lengths, "scale": self._scale, "kept": self._kept}
        return attention_kept(q, k, v, **how)

    @contextmanager
    def _within(self, kept: KeptResult) -> Iterator[None]:
        self._kept = kept
        try:
            yield
        finally:
            self._kept = None
