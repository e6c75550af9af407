"""Softmax attention of recomputed blocks runs once: its result is kept for the second run."""

from collections.abc import Callable
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


class _Within:
    """While a block runs, what its attention keeps; entered again for every backward of a graph."""

    def __init__(self, attention: "KeptAttention", kept: KeptResult) -> None:
        self._attention, self._kept = attention, kept

    def __enter__(self) -> None:
        self._attention.kept = self._kept

    def __exit__(self, *_: object) -> None:
        self._attention.kept = None


class KeptAttention:
    """Stands in for SoftmaxAttention.attend of a block that is run again in the backward.

    Of a token it keeps H * V values and H numbers of fp32 from the first run to the second.

    kept: of the block's run under way; None outside of one that goes backward.
    """

    def __init__(self, mixer: SoftmaxAttention) -> None:
        """Take over what attends in a mixer without a window."""
        self._attend: Attend = mixer.attend
        self._scale = mixer.scale
        self.kept: KeptResult | None = None

    def contexts(self) -> tuple[_Within, _Within]:
        """Return what a block's first run happens in, and its others: torch's context_fn."""
        within = _Within(self, KeptResult())
        return within, within

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, state: Any) -> Tensor:
        """Attend q [B, T, H, D] to keys, or give what the first run gave."""
        if self.kept is None or state is not None:
            return self._attend(q, k, v, batch, state)
        if isinstance(self._attend, _Keeps):
            return self._attend.attend_kept(q, k, v, batch, self.kept)
        if not suits_keeping(q, v, batch.lengths):
            return self._attend(q, k, v, batch, state)
        how = {"lengths": batch.lengths, "scale": self._scale, "kept": self.kept}
        return attention_kept(q, k, v, **how)
