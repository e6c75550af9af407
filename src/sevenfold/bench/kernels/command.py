"""What `sevenfold bench kernels` does: run, print, write the record, draw the sweep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sevenfold.bench.kernels.cases import cases_of
from sevenfold.bench.kernels.record import build_record, default_path, write_json
from sevenfold.bench.kernels.run import run_sides
from sevenfold.bench.kernels.sides import sides_of
from sevenfold.bench.kernels.table import origin, quantity, summary, value_of
from sevenfold.bench.record import commit_of
from sevenfold.config import SevenfoldError, UnsupportedError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to run and where to put it.

    cases names groups, sides names sides; none of either takes all. out is the JSON file, None the
    device's own in benchmarks/results/kernels/. commit is what the record names, None asks git.
    """

    cases: Sequence[str] = ()
    sides: Sequence[str] = ()
    out: Path | None = None
    commit: str | None = None


def run_kernel_benchmark(request: Request, say: Say) -> None:
    """Measure ours and every installed peer; write JSON, and the sweep's figure beside it.

    Args:
        request: what to run.
        say: prints a line.

    Raises:
        ConfigError: a group or a side is unknown.
        UnsupportedError: there is no CUDA device.
        SevenfoldError: a result of our own is wrong or missing; the record is written all the same.
    """
    cases, sides = cases_of(request.cases), sides_of(request.sides)
    if not torch.cuda.is_available():
        raise UnsupportedError("bench kernels must have a CUDA device, got none")
    for side in sides:
        if not side.is_installed():
            say(f"{side.name}: not installed, left out")
    rows, ceilings = run_sides(cases, sides, lambda row: say(progress(row)))
    record = build_record(rows, ceilings, cases, sides, request.commit or commit_of())
    path = request.out or default_path(record["device"])
    write_json(path, record)
    for line in (*origin(record), *summary(rows), f"written to {path}"):
        say(line)
    if any("sweep" in case.groups for case in cases):
        say(f"drawn in {_draw(record, path.with_suffix('.svg'))}")
    check_ours(rows)


def progress(row: Mapping[str, Any]) -> str:
    """Return a row as one line."""
    name = f"{row['side']:>20} | {row['case']:<36} | {row['status']}"
    if row["status"] in ("failed", "unsupported"):
        return f"{name}: {row['note']}"
    error = "none" if row["error"] is None else f"{row['error']:.1e}"
    rule = "" if row["error_rule"] is None else f", {row['error_rule']:.2f} of the error rule"
    return f"{name} {quantity(row, value_of(row))}, relative error {error}{rule}"


def check_ours(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise SevenfoldError unless every row of ours is right."""
    bad = [
        f"{row['case']}: {row['status']}" for row in rows if row["ours"] and row["status"] != "ok"
    ]
    if bad:
        raise SevenfoldError(f"our own results must all be right, got {'; '.join(bad)}")


def _draw(record: Mapping[str, Any], path: Path) -> Path:
    # Here, and not above: no other command should wait for matplotlib.
    from sevenfold.bench.kernels.plot import draw

    draw(record["rows"], record["device"], record["ceilings"]["copy_bytes_per_s"], path)
    return path
