"""Several runs side by side: loss, speed, recall; JSON and a figure.

    python examples/real_text/compare.py runs/real-text-hybrid runs/real-text-softmax \
        runs/real-text-lightning --out benchmarks/results/real-text

Reads each run's metrics.jsonl, run.json and, where recall.py has written one, recall.json.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sevenfold.train import read_metrics

COLOURS = ("#0b6e4f", "#c1440e", "#2b59c3", "#7a4ea3")
WARM_UP_STEPS = 20


def summary(run: Path) -> dict[str, Any]:
    """Return a run's figures: where it ended, how fast it was, what it recalls."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["skipped"] is None]
    validations = [line for line in lines if line["validation_loss"] is not None]
    settled = lines[WARM_UP_STEPS:] or lines
    recall = run / "recall.json"
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    last = validations[-1] if validations else None
    return {
        "run": run.name,
        "device": about["device_name"],
        "commit": about["commit"],
        "updates": lines[-1]["step"],
        "tokens": lines[-1]["tokens"],
        "seconds": sum(line["step_time_s"] for line in lines),
        "validation_loss": last and last["validation_loss"],
        "validation_bits_per_byte": last and last["validation_bits_per_byte"],
        "by_position": last and last["validation_loss_by_position"],
        "by_length": last and last["validation_loss_by_length"],
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in settled),
        "mfu": _median(settled, "mfu"),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
        "curve": [[line["tokens"], line["loss"]] for line in lines[:: max(1, len(lines) // 400)]],
        "validation_curve": [[line["tokens"], line["validation_loss"]] for line in validations],
        "recall": json.loads(recall.read_text(encoding="utf-8"))["rows"] if recall.exists() else [],
    }


def _median(lines: list[dict], key: str) -> float | None:
    values = [line[key] for line in lines if line[key] is not None]
    return statistics.median(values) if values else None


def by_length(rows: list[dict], task: str) -> dict[int, float]:
    """Return the mean share of right tokens over depths, by length of the prompt."""
    lengths = sorted({row["length"] for row in rows if row["task"] == task})
    return {
        length: statistics.fmean(
            row["share_right"] for row in rows if (row["task"], row["length"]) == (task, length)
        )
        for length in lengths
    }


def draw(runs: list[dict], path: Path) -> None:
    """Draw loss over tokens, speed, loss by position, and recall by length of both tasks."""
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(11, 7), layout="constrained")
        axes = figure.subplots(2, 3).flatten()
        for run, colour in zip(runs, COLOURS, strict=False):
            name = run["run"]
            axes[0].plot(*zip(*run["curve"], strict=True), color=colour, lw=0.6, alpha=0.4)
            if run["validation_curve"]:
                axes[0].plot(*zip(*run["validation_curve"], strict=True), color=colour, label=name)
            axes[1].bar(name.split("-")[-1], run["tokens_per_s"], color=colour)
            places = run["by_position"] or {}
            at = [max(128, int(tokens)) for tokens in places]
            axes[2].plot(at, list(places.values()), marker="o", ms=3, color=colour, label=name)
            for axis, task in ((axes[3], "number"), (axes[4], "passage")):
                found = by_length(run["recall"], task)
                shares = [100 * share for share in found.values()]
                axis.plot(list(found), shares, marker="o", ms=3, color=colour, label=name)
        axes[0].set(title="Loss, nats: steps, and validation", xlabel="tokens read")
        axes[1].set(title="Tokens a second, median of steps")
        axes[2].set(title="Validation loss by position", xlabel="position, from")
        axes[2].set_xscale("log", base=2)
        for axis, task in ((axes[3], "a number"), (axes[4], "a passage")):
            axis.set(title=f"Recall of {task}, % of tokens", xlabel="tokens of the prompt")
            axis.set_ylim(0, 100)
        axes[5].remove()
        axes[0].legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def lines(runs: list[dict]) -> list[str]:
    """Return a Markdown table."""
    out = [
        "| run | tokens | validation loss | bits a byte | tokens/s | number | passage |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        recalled = [by_length(run["recall"], task).values() for task in ("number", "passage")]
        shares = [f"{statistics.fmean(values):.1%}" if values else "" for values in recalled]
        loss, bits = run["validation_loss"], run["validation_bits_per_byte"]
        cells = [
            run["run"],
            f"{run['tokens']:,}",
            "" if loss is None else f"{loss:.4f}",
            "" if bits is None else f"{bits:.4f}",
            f"{run['tokens_per_s']:,.0f}",
            *shares,
        ]
        out.append(f"| {' | '.join(cells)} |")
    return out


def main() -> None:
    """Compare runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs = [summary(run) for run in arguments.runs]
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "comparison.json"
    file.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    draw(runs, arguments.out / "comparison.png")
    print("\n".join(lines(runs)))
    print(f"written to {file} and comparison.png")


if __name__ == "__main__":
    main()
