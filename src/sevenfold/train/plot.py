"""A picture of a run from its metrics.jsonl: loss, gradient, rate, speed, experts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sevenfold.config import TrainingError
from sevenfold.train.metrics import METRICS_FILE, read_metrics

PICTURE = "metrics.png"
_LINE, _PALE, _MARK = "#0b6e4f", "#9cc7b7", "#c1440e"
_SMOOTHED_SHARE = 50  # of the updates make a mean

Lines = Sequence[Mapping[str, Any]]


def plot_run(run: Path, out: Path | None = None) -> Path:
    """Draw a run's metrics over the tokens that it has read.

    Args:
        run: the run directory.
        out: the picture, its format by its suffix; None is metrics.png in the run directory.

    Returns:
        The picture's path.

    Raises:
        TrainingError: the run has no update yet.
    """
    lines = read_metrics(run / METRICS_FILE)
    updates = [line for line in lines if line["skipped"] is None]
    if not updates:
        raise TrainingError(f"{run / METRICS_FILE} must hold an update, got none; train first")
    path = out or run / PICTURE
    panels = [_draw_loss, _draw_gradient, _draw_rate, _draw_speed]
    if any(line.get("load_by_layer") for line in updates):
        panels.append(_draw_experts)
    if _positions(updates):
        panels.append(_draw_positions)
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        rows = -(-len(panels) // 2)
        figure = Figure(figsize=(10, 3 * rows), layout="constrained")
        axes = figure.subplots(rows, 2, squeeze=False).flatten()
        for draw, one in zip(panels, axes, strict=False):
            draw(one, updates, [line for line in lines if line["skipped"] is not None])
        for one in axes[len(panels) :]:
            one.remove()
        figure.suptitle(f"{run.name}: {updates[-1]['step']:,} updates")
        figure.savefig(path, dpi=120)
    return path


def _draw_loss(axes: Axes, updates: Lines, skipped: Lines) -> None:
    x, loss = _points(updates, "loss")
    axes.plot(x, loss, color=_PALE, lw=0.8, label="step")
    axes.plot(x, _smoothed(loss), color=_LINE, lw=1.4, label="step, mean of a 50th of the run")
    at, validation = _points(updates, "validation_loss")
    if at:
        axes.plot(at, validation, color=_MARK, marker="o", ms=3, lw=1, label="validation")
    for line in skipped:
        axes.axvline(line["tokens"], color=_MARK, lw=0.5, ls=":")
    axes.set_title("Loss, nats" + ("; dotted: skipped steps" if skipped else ""))
    axes.set_xlabel("tokens read")
    axes.legend(fontsize=8)


def _draw_gradient(axes: Axes, updates: Lines, _: Lines) -> None:
    x, norms = _points(updates, "grad_norm")
    axes.plot(x, norms, color=_LINE, lw=0.8)
    axes.set(title="Gradient norm before clipping", yscale="log", xlabel="tokens read")


def _draw_rate(axes: Axes, updates: Lines, _: Lines) -> None:
    axes.plot(*_points(updates, "lr"), color=_LINE, lw=1.2)
    axes.set(title="Learning rate", xlabel="tokens read", ylim=(0, None))


def _draw_speed(axes: Axes, updates: Lines, _: Lines) -> None:
    x, speed = _points(updates, "tokens_per_s")
    axes.plot(x, speed, color=_PALE, lw=0.8)
    axes.plot(x, _smoothed(speed), color=_LINE, lw=1.4)
    axes.set(title="Tokens a second", xlabel="tokens read", ylim=(0, None))


def _draw_experts(axes: Axes, updates: Lines, _: Lines) -> None:
    chosen = [line for line in updates if line.get("load_by_layer")]
    x = [line["tokens"] for line in chosen]
    worst = [max(load or 0.0 for load in line["load_by_layer"]) for line in chosen]
    axes.plot(x, worst, color=_LINE, lw=1, label="busiest expert of all layers, over an even share")
    axes.set(title="Experts", xlabel="tokens read", ylim=(0, None))
    dropped = [100 * max(share or 0.0 for share in line["dropped_by_layer"]) for line in chosen]
    if any(dropped):
        right = axes.twinx()
        right.plot(x, dropped, color=_MARK, lw=1)
        right.set_ylabel("dropped in the worst layer, %", color=_MARK)
        right.grid(visible=False)
    axes.legend(fontsize=8)


def _draw_positions(axes: Axes, updates: Lines, _: Lines) -> None:
    """Validation loss by position: the first validation, the middle one and the last."""
    found = _positions(updates)
    shown = sorted({0, len(found) // 2, len(found) - 1})
    for number, colour in zip(shown, (_PALE, "#2b59c3", _LINE), strict=False):
        line = found[number]
        by_position = line["validation_loss_by_position"]
        first = [max(int(tokens), 128) for tokens in by_position]
        label = f"after {line['tokens']:,} tokens"
        axes.plot(first, list(by_position.values()), marker="o", ms=3, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set(title="Validation loss by position in a document", xlabel="position, from")
    axes.legend(fontsize=8)


def _positions(updates: Lines) -> list[Mapping[str, Any]]:
    """Validations whose documents reach beyond the first bucket of positions."""
    return [line for line in updates if len(line.get("validation_loss_by_position") or ()) > 1]


def _points(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    found = [(line["tokens"], line[key]) for line in lines if line.get(key) is not None]
    return [tokens for tokens, _ in found], [value for _, value in found]


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean of the last fiftieth of the run, up to each value."""
    width = max(1, len(values) // _SMOOTHED_SHARE)
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means
