"""The whole benchmark: every side's cases, one process a side, then floors and ratios."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sevenfold.bench.kernels.apart import Apart, Failure
from sevenfold.bench.kernels.cases import Case
from sevenfold.bench.kernels.floors import floor_s
from sevenfold.bench.kernels.measure import open_ceilings, open_side
from sevenfold.bench.kernels.sides import Side
from sevenfold.config import SevenfoldError

# The first case of a peer that tunes itself compiles for a minute or more.
CASE_TIMEOUT_S = 240

Row = dict[str, Any]
Report = Callable[[Row], None]


def run_sides(
    cases: Sequence[Case], sides: Sequence[Side], report: Report
) -> tuple[list[Row], dict[str, float]]:
    """Measure every case on every side that has its operator.

    Args:
        cases: what to run.
        sides: who runs it, one process each, one at a time; those not installed are left out.
        report: called with each row as it is done; floors are not in it yet.

    Returns:
        The rows, with floors, and the device's ceilings: the higher of before and after. After an
        interrupt, what was done until then.

    Raises:
        SevenfoldError: the device cannot be measured.
    """
    machine, rows = Apart(open_ceilings), []
    taking = [side for side in sides if side.is_installed() and any(map(side.takes, cases))]
    following = [_open(side) for side in taking[:1]]
    ceilings = _ceilings(machine)
    try:
        for number, side in enumerate(taking):
            apart = following.pop()
            # The next one imports what it needs in the meantime.
            following = [_open(side) for side in taking[number + 1 : number + 2]]
            for case in filter(side.takes, cases):
                row = measured_row(case, side, apart.ask(case, CASE_TIMEOUT_S))
                report(row)
                rows.append(row)
            apart.close()
        after = _ceilings(machine)
        ceilings = {name: max(ceilings[name], after[name]) for name in after}
    except KeyboardInterrupt:
        pass  # What is done counts: it has cost its time on the device.
    machine.close()
    add_floors(rows, cases, ceilings["copy_bytes_per_s"])
    return rows, ceilings


def measured_row(case: Case, side: Side, result: Any) -> Row:
    """Join a case, a side and what became of it."""
    if isinstance(result, Failure):
        result = {"status": "failed", "note": result.reason}
    return {
        "case": case.name,
        "groups": case.groups,
        "task": str(case.task),
        "B": case.B,
        "T": case.T,
        "H": case.H,
        "layer": case.layer,
        "lengths": case.lengths,
        "target": case.target,
        "side": side.name,
        "softmax": side.softmax,
        "ours": side.ours,
        **result,
    }


def add_floors(rows: Sequence[Row], cases: Sequence[Case], copy_bytes_per_s: float) -> None:
    """Add each case's floor in seconds, and its multiple that a side took."""
    floors = {case.name: floor_s(case, copy_bytes_per_s) for case in cases}
    for row in rows:
        floor, took = floors[row["case"]], row.get("median_s")
        row["floor_s"] = floor
        row["over_floor"] = None if floor is None or took is None else took / floor


def _open(side: Side) -> Apart:
    return Apart(partial(open_side, side.name))


def _ceilings(machine: Apart) -> dict[str, float]:
    found = machine.ask(None, CASE_TIMEOUT_S)
    if isinstance(found, Failure):
        raise SevenfoldError(f"the device must copy and multiply, got {found.reason}")
    return found
