"""metrics.jsonl: one line for each step, the record that everything else reads."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sevenfold.config import TrainingError

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """What one step did; None where a number does not apply.

    Args:
        step: updates done, this one included; a skipped step repeats the number before.
        next_sample: samples read so far, which tells every line apart.
        tokens: tokens read so far.
        loss: mean cross-entropy over the step's labels, nats.
        bits_per_byte: the same cross-entropy over the UTF-8 bytes that the labels stand for.
        balance_loss, z_loss, dropped: of the routers, mean over layers; dropped is a share.
        grad_norm: before clipping.
        lr: learning rate of the update.
        skipped: why the step changed nothing.
        goes_back: whether the run went on from its newest checkpoint's weights after this step.
        step_time_s: of the whole step, data included, validation and checkpoint excluded.
        tokens_per_s, flops_per_s: of the step; model FLOPs, without recomputation.
        mfu: flops_per_s over the device's peak.
        peak_memory_bytes: of the device's allocator; on a CPU of the process.
        validation_loss, validation_bits_per_byte: where the step ended with a validation.
        validation_loss_by_position, validation_loss_by_length: mean losses by the first token of a
            bucket, of tokens' positions in their documents and of documents' lengths.
        dropped_by_layer, load_by_layer: of each layer with experts; load is what the busiest expert
            was chosen for, over an even share.
    """

    step: int
    next_sample: int
    tokens: int
    loss: float | None
    bits_per_byte: float | None
    balance_loss: float | None
    z_loss: float | None
    dropped: float | None
    grad_norm: float | None
    lr: float
    skipped: str | None
    step_time_s: float
    tokens_per_s: float
    flops_per_s: float
    mfu: float | None
    peak_memory_bytes: int
    validation_loss: float | None = None
    validation_bits_per_byte: float | None = None
    validation_loss_by_position: dict[str, float | None] | None = None
    validation_loss_by_length: dict[str, float | None] | None = None
    dropped_by_layer: tuple[float | None, ...] | None = None
    load_by_layer: tuple[float | None, ...] | None = None
    goes_back: bool = False

    def scalars(self) -> dict[str, float]:
        """Return the numbers that a chart over steps can show, by name."""
        shown = asdict(self)
        for group in ("validation_loss_by_position", "validation_loss_by_length"):
            shown |= {f"{group}/{tokens}": x for tokens, x in (shown[group] or {}).items()}
        for group in ("dropped_by_layer", "load_by_layer"):
            shown |= {f"{group}/{layer}": x for layer, x in enumerate(shown[group] or ())}
        not_shown = ("step", "next_sample", "goes_back")
        return {
            name: value
            for name, value in shown.items()
            if isinstance(value, int | float) and name not in not_shown
        }

    def as_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)


def finite(value: float) -> float | None:
    """Return a number that JSON can hold; None for NaN and infinity."""
    return value if math.isfinite(value) else None


class MetricsFile:
    """Appends lines to metrics.jsonl, each flushed as it is written.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, record: StepRecord) -> None:
        """Append one line.

        Raises:
            TrainingError: the disk refuses it.
        """
        try:
            self._stream.write(record.as_json() + "\n")
        except OSError as error:
            raise self._error(error) from error

    def sync(self) -> None:
        """Flush to the disk, so that a checkpoint never lies ahead of the record."""
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"{self._stream.name} must be writable, got: {error.strerror}; free space and "
            f"start the run again: it goes on from its last checkpoint"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line that a killed process left half-written is dropped.

    Args:
        path: the file; a missing one has no lines.

    Returns:
        One dict for each line.
    """
    if not path.exists():
        return []
    whole, newline, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.split("\n")] if newline else []


def truncate_metrics(path: Path, next_sample: int) -> None:
    """Drop the lines of steps that a resumed run takes again, by one atomic rename.

    Args:
        path: the file.
        next_sample: the checkpoint's; lines that read further go.
    """
    kept = [line for line in read_metrics(path) if line["next_sample"] <= next_sample]
    staging = path.with_name(f".{path.name}.tmp")
    with staging.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in kept)
        stream.flush()
        os.fsync(stream.fileno())
    staging.replace(path)
