"""The figure: time of a million tokens against the length of a sequence."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sevenfold.bench.kernels.cases import SWEEP_HEADS, SWEEP_TOKENS, Case, Task
from sevenfold.bench.kernels.crossover import Curve, crossover, sweep_curves
from sevenfold.bench.kernels.floors import floor_s

OURS = "sevenfold"
# Side -> label, colour, line style.
STYLES = {
    OURS: ("sevenfold", "#0b6e4f", "-"),
    "fla chunk": ("fla (chunk)", "#2b59c3", "-"),
    "jax-linear-attention": ("jax-linear-attention", "#7a4ea3", "-"),
    "softmax flash": ("softmax, FlashAttention-2", "#c1440e", "--"),
    "softmax cuDNN": ("softmax, cuDNN", "#d99a00", "--"),
}


def draw(
    rows: Sequence[Mapping[str, Any]], device: str, copy_bytes_per_s: float, path: Path
) -> None:
    """Draw the length sweep of a record, with the lengths from which ours beats softmax.

    Args:
        rows: the record's.
        device: its name, for the title.
        copy_bytes_per_s: sets the floor's line.
        path: the SVG file to write.
    """
    curves = sweep_curves(rows)
    # The same figure from the same record: no random names, no date.
    settings: dict[Any, Any] = {"svg.hashsalt": "sevenfold", "svg.fonttype": "none", "font.size": 9}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        for side, (label, colour, style) in STYLES.items():
            if side in curves:
                axes.plot(
                    *_points(curves[side]), style, color=colour, marker="o", ms=3, label=label
                )
        case = Case("", ("sweep",), Task.FORWARD, 1, SWEEP_TOKENS, SWEEP_HEADS)
        floor = floor_s(case, copy_bytes_per_s)
        assert floor is not None
        axes.axhline(floor * 1e3, color="#666", lw=0.8, ls=":", label="floor: bytes at copy speed")
        _mark_crossovers(axes, curves)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="tokens of a sequence",
            ylabel=f"ms per {SWEEP_TOKENS:,} tokens",
            title=f"Forward, {SWEEP_HEADS} heads of 128, bf16, {device}",
        )
        ticks = [2**n for n in range(7, 23)]
        axes.set_xticks(ticks, [_short(T) for T in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        figure.legend(fontsize=8, loc="outside lower center", ncols=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _points(curve: Curve) -> tuple[list[int], list[float]]:
    return list(curve), [took * 1e3 for took in curve.values()]


def _mark_crossovers(axes: Any, curves: Mapping[str, Curve]) -> None:
    for side in ("softmax flash", "softmax cuDNN"):
        if OURS not in curves or side not in curves:
            continue
        tokens = crossover(curves[OURS], curves[side])
        if tokens is None:
            continue
        _, colour, _ = STYLES[side]
        first = tokens <= min(curves[side])
        text = f"faster than {side}\nfrom {tokens:,.0f} tokens" + (" or less" if first else "")
        axes.axvline(tokens, color=colour, lw=0.8, ls=":")
        height = 0.97 if side.endswith("flash") else 0.80
        axes.annotate(
            text,
            (tokens, height),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=colour,
            fontsize=8,
            va="top",
        )


def _short(T: int) -> str:
    return f"{T // 2**20}M" if T >= 2**20 else f"{T // 1024}k" if T >= 1024 else str(T)
