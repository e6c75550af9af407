"""Mixture-of-experts pieces: who goes where, moving rows there and back, the grouped products."""

from sevenfold.ops.experts.api import default_grouped_impl, grouped_linear
from sevenfold.ops.experts.dispatch import Dispatch, combine, gather_rows, plan_dispatch

__all__ = [
    "Dispatch",
    "combine",
    "default_grouped_impl",
    "gather_rows",
    "grouped_linear",
    "plan_dispatch",
]
