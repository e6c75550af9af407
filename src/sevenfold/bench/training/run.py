"""Every case in a process of its own; rows join those that the record holds already."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sevenfold.bench.kernels.apart import Apart, Failure
from sevenfold.bench.kernels.record import write_json
from sevenfold.bench.record import commit_of, device_name
from sevenfold.bench.training.cases import Case
from sevenfold.bench.training.measure import open_device

CASE_TIMEOUT_S = 240.0

Row = dict[str, Any]


def run_cases(cases: Sequence[Case], device: str, report: Callable[[Row], None]) -> list[Row]:
    """Measure cases one after another, each in a new process.

    Args:
        cases: what to measure.
        device: "cpu" or "cuda".
        report: called with each row as it is done.

    Returns:
        One row a case; one that failed says why.
    """
    rows = []
    for case in cases:
        apart = Apart(partial(open_device, device))
        row = _row(case, apart.ask(case, CASE_TIMEOUT_S))
        apart.close()
        report(row)
        rows.append(row)
    return rows


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], device: str, commit: str | None
) -> list[Row]:
    """Put rows into a record: each takes the place of an earlier one of its case and side.

    Args:
        path: the JSON file.
        rows: as run_cases returns or reports them.
        device: where they ran.
        commit: of the code; None asks git.

    Returns:
        All rows that the record holds now.
    """
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    origin = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "commit": commit or commit_of(),
        "versions": _versions(),
    }
    joined: dict[tuple[str, str, str], Row] = {_key(row): row for row in known}
    joined |= {_key(row): {**row, **origin} for row in rows}
    everything = list(joined.values())
    write_json(path, {"command": "sevenfold bench train", "rows": everything})
    return everything


def _row(case: Case, result: Any) -> Row:
    if isinstance(result, Failure):
        result = {"status": "failed", "note": result.reason}
    else:
        result = {"status": "ok", "note": None, **result}
    return {
        "case": case.name,
        "group": case.group,
        "side": case.side,
        "model": case.model,
        "rows": case.rows,
        "tokens": case.tokens,
        "recompute": case.recompute,
        "target_tokens_per_s": case.target_tokens_per_s,
        "target_share": case.target_share,
        **result,
    }


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["group"], row["case"], row["side"]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("sevenfold", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # a run of our side alone needs no peer, and a copy of the code no install
    return found
