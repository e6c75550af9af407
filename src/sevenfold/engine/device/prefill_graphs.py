"""The prefill of one request's chunk in a few sizes, each recorded once."""

from collections.abc import Callable, Sequence

from torch import Tensor

from sevenfold.engine.device.capture import Capture
from sevenfold.engine.device.graphs import Recorder, least_size
from sevenfold.engine.device.prefill_inputs import PrefillInputs
from sevenfold.engine.rows import Row
from sevenfold.models import ModelConfig
from sevenfold.models.accounting import prefill_flops

# Tokens times keys that a row may have: beyond, attention over pages takes longer than the host's
# launches. Keys at most, whose pages are sent with every chunk.
_MOST_PAIRS, _MOST_KEYS = 8192 * 16_384, 1 << 20
MOST_STOPS = 16
_SIZES = (16, 32, 64, 80, 96, 112, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# What a GPU computes of a layer at 400 TFLOP/s while a host launches its kernels: 39 of them, at
# 80 us each, in bench-2b on a slow host. Beyond, a recording's memory buys nothing.
_MOST_LAYER_FLOPS = 1.2e12


class PrefillGraphs:
    """Prefills of one row over a set of sizes, recorded when a size is first met.

    The largest is recorded before any other, for all share one pool of memory, and what it leaves
    there holds each of the smaller ones.
    """

    def __init__(
        self,
        step: Callable[[PrefillInputs], Tensor],
        capture: Capture,
        sizes: Sequence[int],
        new_inputs: Callable[[int], PrefillInputs],
    ) -> None:
        """Record nothing yet.

        Args:
            step: the model on inputs of a size: [1, vocab_size] logits after the row's last token.
                It reads nothing else that changes.
            capture: records it.
            sizes: tokens, rising.
            new_inputs: allocates them for a size, with room for MOST_STOPS snapshots and the pages
                of most_keys.
        """
        self._sizes = tuple(sizes)
        self._recorder: Recorder[int, PrefillInputs] = Recorder(step, capture, new_inputs, {})

    def size_of(self, rows: Sequence[Row]) -> int | None:
        """The least size that holds the rows; None where none does, or they are not one prompt."""
        if len(rows) != 1 or rows[0].scored is not None:
            return None
        row = rows[0]
        size = least_size(self._sizes, len(row.tokens))
        if size is None or row.end > most_keys(size) or len(row.snapshots) > MOST_STOPS:
            return None
        return size

    def run(self, size: int, row: Row, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run a row by the recording of a size, which copies and clears items before.

        places: as ItemWords.places gives them.

        Returns:
            [1, vocab_size] fp32, and the choice [1, 2] int64; the next run overwrites both.
        """
        self._recorder.at(self._sizes[-1])
        inputs, captured = self._recorder.at(size)
        inputs.fill(row, places)
        try:
            captured.replay()
        finally:  # an interrupt may come between the two, and the buffer is read all the same
            inputs.note_launched()
        return captured.output, inputs.chosen


def most_keys(size: int) -> int:
    """Return how many keys a row of so many tokens may have, its own among them."""
    return min(_MOST_PAIRS // size, _MOST_KEYS)


def prefill_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Return the sizes of prefills whose launches take a host longer than a GPU their work.

    16, 32, 64, 80, 96, 112, 128, 256, 512, 768, 1024, then one and a half times and twice as many
    up to 8192, as far as a layer has so little to do and the model's positions reach.
    """
    most = _MOST_LAYER_FLOPS * config.num_hidden_layers
    pay = [size for size in _SIZES if prefill_flops(config, size) <= most]
    enough = least_size(pay, config.max_position_embeddings)
    return tuple(size for size in pay if enough is None or size <= enough)
