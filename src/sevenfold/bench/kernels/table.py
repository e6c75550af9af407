"""A record as Markdown: one table a group of cases, notes on what failed, where it was measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sevenfold.bench.kernels.cases import Task
from sevenfold.bench.kernels.crossover import crossover, sweep_curves

Row = Mapping[str, Any]

OURS = "sevenfold"
TITLES = {
    "forward": "Forward",
    "backward": "Forward and backward",
    "memory": "Extra memory of forward and backward",
    "decode": "Decoding: one token a sequence, one layer",
    "verify": "Verification of a draft, one layer",
    "layers": "The fastest layer (0 of 80) and the slowest (78, 79)",
    "packed": "Packed documents",
    "widths": "Other widths",
    "sweep": "Length sweep, 4 heads",
}


def render(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of a record's page."""
    lines = [*origin(record), ""]
    rows = record["rows"]
    for group, title in TITLES.items():
        of_group = [row for row in rows if group in row["groups"]]
        if of_group:
            lines += [f"### {title}", "", *group_table(of_group), ""]
    return [*lines, *_crossover_lines(rows), *_draft_lines(rows), *_notes(rows)]


def group_table(rows: Sequence[Row]) -> list[str]:
    """Return one table: a line a case, a column a side that takes part.

    A cell is the time, and in brackets how many times ours it is; ours has the multiple of the
    floor.
    """
    sides = list(dict.fromkeys(row["side"] for row in rows))
    found = {(row["case"], row["side"]): row for row in rows}
    head = ["case", "floor", "target on an H200", *sides]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for case in dict.fromkeys(row["case"] for row in rows):
        first = next(row for row in rows if row["case"] == case)
        ours = found.get((case, OURS))
        cells = [_cell(found.get((case, side)), ours) for side in sides]
        lines.append([case, quantity(first, first["floor_s"]), _target(first), *cells])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def summary(rows: Sequence[Row]) -> list[str]:
    """Return a line a case: ours, its multiple of the floor, its target, the best right peer."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case and row["status"] == "ok"]
        ours = [row for row in of_case if row["ours"]]
        peers = [row for row in of_case if not row["ours"]]
        parts = [*(_own_part(row) for row in ours)]
        if peers:
            best = min(peers, key=value_of)
            parts.append(f"best peer {best['side']} {quantity(best, value_of(best))}")
            if ours:
                parts.append(
                    f"{value_of(best) / max(value_of(min(ours, key=value_of)), 1e-12):.2f}x ours"
                )
        lines.append(f"{case}: {', '.join(parts) or 'no right result'}")
    return lines


def origin(record: Mapping[str, Any]) -> list[str]:
    """Return what the figures belong to."""
    ceilings = record["ceilings"]
    versions = {
        side["package"]: side["version"]
        for side in record["sides"].values()
        if side["installed"] and side["version"]
    }
    return [
        f"{record['device']}: copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 matmul "
        f"{ceilings['matmul_flops_per_s'] / 1e12:,.0f} TFLOP/s. CUDA {record['cuda']}, Python "
        f"{record['python']}, {', '.join(f'{n} {v}' for n, v in versions.items())}; commit "
        f"{record['commit'] or 'unknown'}, {record['date']}."
    ]


def quantity(row: Row, value: float | None) -> str:
    """Return a time in ms or µs, or bytes where the case weighs memory."""
    if value is None:
        return "0" if row["task"] == Task.MEMORY else "–"
    if row["task"] == Task.MEMORY:
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
    if value < 1e-4:
        return f"{value * 1e6:.1f} µs"
    digits = 3 if value < 1e-2 else 2 if value < 0.1 else 1 if value < 1 else 0
    return f"{value * 1e3:,.{digits}f} ms"


def value_of(row: Row) -> float:
    """Return what a row is ranked by: its time, or its bytes where the case weighs memory."""
    return row["extra_bytes"] if row["task"] == Task.MEMORY else row["median_s"]


def _cell(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] in ("failed", "unsupported"):
        return row["status"]
    text = quantity(row, value_of(row))
    if row["ours"]:
        over = "" if row["over_floor"] is None else f" ({row['over_floor']:.2f} x floor)"
        text = f"**{text}**{over}"
    elif ours is not None and ours["status"] in ("ok", "wrong") and value_of(ours) > 0:
        text += f" ({value_of(row) / value_of(ours):.2f}x)"
    return text if row["status"] == "ok" else f"wrong: {text}"


def _target(row: Row) -> str:
    return "–" if row["target"] is None else quantity(row, row["target"])


def _own_part(row: Row) -> str:
    target = "" if row["target"] is None else f", target {quantity(row, row['target'])}"
    over = "" if row["over_floor"] is None else f", {row['over_floor']:.2f} x floor"
    return f"{row['side']} {quantity(row, value_of(row))}{over}{target}"


def _crossover_lines(rows: Iterable[Row]) -> list[str]:
    curves = sweep_curves(list(rows))
    lines = []
    for side in ("softmax flash", "softmax cuDNN"):
        if OURS in curves and side in curves:
            tokens = crossover(curves[OURS], curves[side])
            where = "at no length measured" if tokens is None else f"from {tokens:,.0f} tokens on"
            last = max(set(curves[OURS]) & set(curves[side]))
            ratio = curves[side][last] / curves[OURS][last]
            lines.append(
                f"- Ours is faster than {side} {where}; at {last:,} tokens {ratio:,.0f} times."
            )
    return [*lines, ""] if lines else []


def _draft_lines(rows: Iterable[Row]) -> list[str]:
    drafts = [row for row in rows if row["task"] == Task.VERIFY and "extra_bytes" in row]
    sizes = (f"{row['side']} {row['extra_bytes'] / 1e6:,.1f} MB" for row in drafts)
    return [f"- Memory of the draft in verification: {', '.join(sizes)}.", ""] if drafts else []


def _notes(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["status"] == "wrong":
            error = "not a number" if row["error"] is None else f"{row['error']:.1e}"
            lines.append(f"- {row['case']}, {row['side']}: wrong, relative error {error}.")
        elif row["status"] != "ok":
            lines.append(f"- {row['case']}, {row['side']}: {row['status']}: {row['note']}.")
    return lines
