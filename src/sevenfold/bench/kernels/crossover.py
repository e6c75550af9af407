"""Where one latency curve over the length crosses another."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sevenfold.bench.kernels.cases import SWEEP_TOKENS

Curve = dict[int, float]


def sweep_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return each side's time by length, of the sweep's rows that are right.

    Longer cases than a million tokens hold more of them; theirs is the time per million.
    """
    curves: dict[str, Curve] = {}
    for row in rows:
        if "sweep" in row["groups"] and row["status"] == "ok":
            share = SWEEP_TOKENS / (row["B"] * row["T"])
            curves.setdefault(row["side"], {})[row["T"]] = row["median_s"] * share
    return {side: dict(sorted(curve.items())) for side, curve in curves.items()}


def crossover(ours: Curve, theirs: Curve) -> float | None:
    """Return the length in tokens from which on ours is faster, by lines between log-log points.

    None where it is not faster at the longest common length. The shortest common length means that
    it is faster at every length measured.
    """
    lengths = sorted(set(ours) & set(theirs))
    if not lengths or ours[lengths[-1]] >= theirs[lengths[-1]]:
        return None
    lead = {T: math.log(theirs[T] / ours[T]) for T in lengths}
    behind = [T for T in lengths if lead[T] <= 0]
    if not behind:
        return float(lengths[0])
    below = behind[-1]
    above = lengths[lengths.index(below) + 1]
    share = -lead[below] / (lead[above] - lead[below])
    return math.exp(math.log(below) + share * math.log(above / below))
