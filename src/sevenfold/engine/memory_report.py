"""A memory plan for people, and for a metrics page."""

from typing import Any

from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.state_layout import RING_TOKENS

CONTEXTS = (8_192, 131_072, 1_048_576)

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def plan_values(plan: MemoryPlan) -> dict[str, Any]:
    """Return what a plan gives as plain values: JSON, gauges."""
    layout = plan.layout
    return {
        "budget_bytes": plan.budget_bytes,
        "slab_bytes": layout.slab_bytes,
        "num_slabs": layout.num_slabs,
        "host_bytes": plan.host_bytes,
        "page_tokens": plan.page_tokens,
        "state_bytes": plan.state_bytes,
        "ring_bytes": plan.ring_bytes,
        "page_bytes": plan.page_bytes,
        "snapshot_bytes": plan.snapshot_bytes,
        "state_dtype": plan.state_dtype,
        "snapshot_dtype": plan.snapshot_dtype,
        "snapshot_heads": plan.snapshot.num_heads,
        "states_per_slab": layout.places[Tenant.STATE],
        "pages_per_slab": layout.places[Tenant.PAGE],
        "snapshots_per_slab": layout.places[Tenant.SNAPSHOT],
        "longest_context_tokens": plan.longest_context_tokens,
        "smallest_cacheable_prefix_tokens": plan.smallest_cacheable_prefix_tokens,
        "concurrency": {context: plan.concurrency(context) for context in CONTEXTS},
    }


def plan_report(plan: MemoryPlan, limits: SchedulerConfig | None = None) -> str:
    """Return what a plan gives as lines of text.

    Args:
        plan: of the memory.
        limits: what its engine keeps to, such as the model's own longest context; None reports what
            the memory alone would allow.
    """
    layout = plan.layout
    longest, smallest = plan.longest_context_tokens, plan.smallest_cacheable_prefix_tokens
    contexts = CONTEXTS
    if limits is not None:
        longest, smallest = limits.max_request_tokens, limits.grain_tokens
        if longest is not None:
            contexts = tuple(sorted({longest, *(n for n in CONTEXTS if n < longest)}))
    rows = [
        ("memory", f"{_size(plan.budget_bytes)}: {layout.num_slabs:,} slabs of "
         f"{_size(layout.slab_bytes)}, one of them the sink"),
        ("state", _item(plan, Tenant.STATE, plan.state_bytes, f"a request, {_active(plan)}")),
        *_ring(plan),
        ("page", _item(plan, Tenant.PAGE, plan.page_bytes, f"for {plan.page_tokens} tokens")),
        ("snapshot", _item(plan, Tenant.SNAPSHOT, plan.snapshot_bytes, _cached(plan))),
        *_host(plan),
        ("longest context", "any" if longest is None else f"{longest:,} tokens"),
        *((f"at {context:,} tokens", f"{plan.concurrency(context):,} requests at a time")
          for context in contexts),
        ("cacheable prefix", f"from {smallest} tokens"),
    ]  # fmt: skip
    return "\n".join(f"{name:<19} {value}" for name, value in rows)


def _active(plan: MemoryPlan) -> str:
    tokens = RING_TOKENS + plan.ring_tokens
    ring = f" and a ring of {tokens} tokens" if plan.state_dtype == "int8" else ""
    return plan.state_dtype + ring


def _cached(plan: MemoryPlan) -> str:
    """The snapshots' precision; with "auto", how many heads have which."""
    if plan.snapshot_dtype != "auto":
        return plan.snapshot_dtype
    heads = sorted(plan.snapshot.num_heads.items())
    return "auto: " + ", ".join(f"{number:,} heads {name}" for name, number in heads)


def _ring(plan: MemoryPlan) -> list[tuple[str, str]]:
    if not plan.ring_bytes:
        return []
    return [
        ("drafts", f"{_size(plan.ring_bytes)} beside each state, for {plan.ring_tokens} tokens")
    ]


def _host(plan: MemoryPlan) -> list[tuple[str, str]]:
    if plan.host is None:
        return []
    slabs = f"{plan.host.num_slabs:,} slabs of the host's memory"
    return [("evicted prefixes", f"{_size(plan.host_bytes)}: {slabs}")]


def _item(plan: MemoryPlan, tenant: Tenant, num_bytes: int, what: str) -> str:
    if not num_bytes:
        return "none"
    return f"{_size(num_bytes)} {what}; {plan.layout.places[tenant]:,} a slab"


def _size(num_bytes: int) -> str:
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:,.1f} {_UNITS[unit]}" if unit else f"{num_bytes} B"
