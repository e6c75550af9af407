"""Decoding steps of a few sizes, each recorded once; a batch takes the least that holds it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sevenfold.config import ConfigError
from sevenfold.engine.device.capture import Capture, Captured
from sevenfold.engine.device.decode_inputs import DecodeInputs, Size
from sevenfold.engine.runner import Row

Step = Callable[[DecodeInputs], Tensor]

# Room costs an upload of 8 bytes a page and row, a size costs a graph: so sizes are few.
_LEAST_PAGES = 16
_GROWTH = 8


@dataclass(frozen=True)
class _Recorded:
    inputs: DecodeInputs
    captured: Captured


class DecodeGraphs:
    """Decoding over a set of batch sizes, recorded when a size is first met.

    Tables have room for 16, 128, 1024 and so on pages a row. With one batch size alone each product
    of a step has one shape, whatever the batch: no row's result depends on its company.
    """

    def __init__(
        self, step: Step, capture: Capture, batch_sizes: Sequence[int], *, device: torch.device
    ) -> None:
        """Record nothing yet.

        Args:
            step: the model on inputs of a size: [rows, vocab_size] logits. It reads nothing else
                that changes.
            capture: records it.
            batch_sizes: rows, rising.
            device: of the inputs.

        Raises:
            ConfigError: the sizes do not rise from 1 or more.
        """
        rising = all(a < b for a, b in pairwise(batch_sizes))
        if not batch_sizes or batch_sizes[0] < 1 or not rising:
            raise ConfigError(
                f"decode_batch_sizes must rise from 1 or more, got {list(batch_sizes)}"
            )
        self._step, self._capture, self._device = step, capture, device
        self._batch_sizes = tuple(batch_sizes)
        self._recorded: dict[Size, _Recorded] = {}

    def size_of(self, rows: Sequence[Row]) -> Size | None:
        """The least size that holds the rows; None where they are more than any."""
        fitting = [size for size in self._batch_sizes if size >= len(rows)]
        room = _LEAST_PAGES
        while room < max(len(row.pages) for row in rows):
            room *= _GROWTH
        return Size(fitting[0], room) if fitting else None

    def run(self, rows: Sequence[Row], size: Size, page_tokens: int) -> Tensor:
        """Run rows in a step of a size.

        Returns:
            [len(rows), vocab_size]; the next run overwrites it.
        """
        recorded = self._recorded.get(size)
        if recorded is None:
            recorded = self._recorded[size] = self._record(size)
        recorded.inputs.fill(rows, page_tokens)
        recorded.captured.replay()
        return recorded.captured.output[: len(rows)]

    def _record(self, size: Size) -> _Recorded:
        """Record a step of padding alone, which touches nobody's memory."""
        inputs = DecodeInputs(size, self._device)
        return _Recorded(inputs, self._capture(lambda: self._step(inputs)))


def decode_batch_sizes(most: int) -> tuple[int, ...]:
    """Return 1, 2, 4, then multiples of 8 up to 64, of 32 beyond, and `most`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most, 32)]
    return (*(size for size in sizes if size < most), most)
