"""Mixture-of-experts pieces: routing, who goes where, the grouped products, the whole mixture."""

from sevenfold.ops.experts.api import default_grouped_impl, grouped_linear
from sevenfold.ops.experts.dispatch import (
    Dispatch,
    combine,
    default_dispatch_impl,
    gather_rows,
    plan_dispatch,
)
from sevenfold.ops.experts.grouped_swiglu import grouped_swiglu
from sevenfold.ops.experts.mixture import default_mixture_impl, mixture
from sevenfold.ops.experts.parts import combine_parts, gather_parts
from sevenfold.ops.experts.router import default_router_impl, router_logits
from sevenfold.ops.experts.routing import default_route_impl, route, route_and_count

__all__ = [
    "Dispatch",
    "combine",
    "combine_parts",
    "default_dispatch_impl",
    "default_grouped_impl",
    "default_mixture_impl",
    "default_route_impl",
    "default_router_impl",
    "gather_parts",
    "gather_rows",
    "grouped_linear",
    "grouped_swiglu",
    "mixture",
    "plan_dispatch",
    "route",
    "route_and_count",
    "router_logits",
]
