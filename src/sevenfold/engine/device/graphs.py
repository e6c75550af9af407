"""Steps of a few sizes, each recorded once; a batch takes the least that holds it."""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sevenfold.config import ConfigError
from sevenfold.engine.device.capture import Capture, Captured
from sevenfold.engine.device.decode_inputs import DecodeInputs, Size
from sevenfold.engine.rows import NextRow, Row

# Room costs an upload of 8 bytes a page and row, a size costs a graph: so sizes are few.
_LEAST_PAGES = 16
_GROWTH = 8

Key = TypeVar("Key", bound=Hashable)
Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Recorder(Generic[Key, Inputs]):
    """A step recorded for each size when it is first met.

    step: the model on inputs of a size; it reads nothing else that changes.
    new_inputs: allocates them. A step is recorded on padding alone, which touches nobody's memory.
    """

    step: Callable[[Inputs], Tensor]
    capture: Capture
    new_inputs: Callable[[Key], Inputs]
    recorded: dict[Key, tuple[Inputs, Captured]]

    def at(self, size: Key) -> tuple[Inputs, Captured]:
        """Return the inputs and the recorded step of a size."""
        if size not in self.recorded:
            with torch.inference_mode():
                inputs = self.new_inputs(size)
                self.recorded[size] = (inputs, self.capture(lambda: self.step(inputs)))
        return self.recorded[size]


class DecodeGraphs:
    """Decoding over a set of batch sizes, recorded when a size is first met.

    Tables have room for 16, 128, 1024 and so on pages a row. With one batch size alone each product
    of a step has one shape, whatever the batch: no row's result depends on its company.
    """

    def __init__(
        self,
        step: Callable[[DecodeInputs], Tensor],
        capture: Capture,
        batch_sizes: Sequence[int],
        *,
        device: torch.device,
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
        check_batch_sizes(batch_sizes)
        self._batch_sizes = tuple(batch_sizes)
        self._recorder: Recorder[Size, DecodeInputs] = Recorder(
            step, capture, lambda size: DecodeInputs(size, device), {}
        )

    def size_of(self, rows: Sequence[Row | NextRow | None]) -> Size | None:
        """The least size that holds the rows; None where they are more than any."""
        num_rows = self.num_rows(len(rows))
        if num_rows is None:
            return None
        return Size(num_rows, page_room(most_pages(rows)))

    def num_rows(self, needed: int) -> int | None:
        """Rows of the least step that has as many as are needed; None where none has."""
        return least_size(self._batch_sizes, needed)

    def run(self, size: Size, fill: Callable[[DecodeInputs], None]) -> tuple[Tensor, DecodeInputs]:
        """Run a step of a size on what `fill` writes into its inputs.

        Returns:
            [size.rows, vocab_size], and the inputs; the next run overwrites both.
        """
        inputs, captured = self._recorder.at(size)
        fill(inputs)
        captured.replay()
        return captured.output, inputs


def most_pages(rows: Sequence[Row | NextRow | None]) -> int:
    """Return the most pages that a row has, at least one."""
    return max(1, *(len(row.pages) for row in rows if row is not None))


def check_batch_sizes(batch_sizes: Sequence[int]) -> None:
    """Raise ConfigError unless the sizes rise from 1 or more."""
    rising = all(a < b for a, b in pairwise(batch_sizes))
    if not batch_sizes or batch_sizes[0] < 1 or not rising:
        raise ConfigError(f"decode_batch_sizes must rise from 1 or more, got {list(batch_sizes)}")


def least_size(sizes: Sequence[int], needed: int) -> int | None:
    """Return the first of rising sizes that is no less than what is needed, or None."""
    place = bisect_left(sizes, needed)
    return sizes[place] if place < len(sizes) else None


def page_room(num_pages: int) -> int:
    """Return 16, 128, 1024 and so on: room for so many pages in each row of a table."""
    room = _LEAST_PAGES
    while room < num_pages:
        room *= _GROWTH
    return room


def decode_batch_sizes(most: int) -> tuple[int, ...]:
    """Return 1, 2, 4, then multiples of 8 up to 64, of 32 beyond, and `most`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most, 32)]
    return (*(size for size in sizes if size < most), most)


def draft_token_sizes(most: int) -> tuple[int, ...]:
    """Return 2, 4, 8 and so on, and `most`: tokens of drafts, their roots among them."""
    return (*(size for size in (2, 4, 8) if size < most), most)
