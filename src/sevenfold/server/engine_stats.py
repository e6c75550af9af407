"""What the batching engine tells of itself, for the metrics."""

from dataclasses import replace

from sevenfold.engine.cache import CacheManager
from sevenfold.engine.engine import Engine
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.scheduler import WaitReason
from sevenfold.engine.speculation import SpeculationCounters
from sevenfold.server.engine_protocol import EngineStats, HostStats, Pool


def read_stats(engine: Engine, fixed: EngineStats, steps: int) -> EngineStats:
    """Return what an engine tells of itself.

    Args:
        engine: between two steps.
        fixed: what does not change.
        steps: that computed something.
    """
    scheduler, counters = engine.scheduler, engine.counters()
    usage, plan = engine.cache.usage(), engine.cache.plan
    drafts = engine.speculation_counters() or SpeculationCounters()
    layout = plan.layout
    sizes = (plan.state_bytes, plan.page_bytes, plan.snapshot_bytes)
    states, pages, snapshots = (
        Pool(usage.num_items[t], layout.num_usable_slabs * layout.places[t], sizes[t])
        for t in Tenant
    )
    taken = layout.num_usable_slabs - usage.num_free_slabs
    held = {"states": states, "kv": pages, "snapshots": snapshots}
    memory = {name: pool.used * pool.bytes_each for name, pool in held.items()}
    return replace(
        fixed,
        running=scheduler.num_prefilling + scheduler.num_decoding,
        waiting={
            reason.value: scheduler.num_waiting * (reason is scheduler.waits_for)
            for reason in WaitReason
        },
        steps=steps,
        slabs=Pool(taken, layout.num_usable_slabs, layout.slab_bytes),
        pages=pages,
        states=states,
        snapshots=snapshots,
        memory_bytes={**fixed.memory_bytes, **memory},
        prompt_tokens=counters.query_tokens,
        cached_tokens=counters.hit_tokens,
        potential_tokens=counters.missed_tokens,
        misses=counters.misses,
        recomputed_tokens=scheduler.num_recomputed_tokens,
        snapshots_taken=counters.num_snapshots,
        snapshots_refused=counters.num_refused_snapshots,
        snapshots_evicted=counters.num_evicted,
        pages_dropped=counters.num_dropped_pages,
        preemptions=scheduler.num_preemptions,
        nonfinite_outputs=engine.num_nonfinite,
        drafts=drafts.num_drafts,
        drafted_tokens=drafts.num_drafted_tokens,
        accepted_tokens=drafts.num_accepted_tokens,
        sessions=engine.cache.num_sessions,
        host=_host_stats(engine.cache, plan),
    )


def _host_stats(cache: CacheManager, plan: MemoryPlan) -> HostStats | None:
    usage, counters = cache.host_usage(), cache.host_counters()
    if plan.host is None or usage is None or counters is None:
        return None
    total = plan.host.num_usable_slabs
    return HostStats(
        slabs=Pool(total - usage.num_free_slabs, total, plan.host.slab_bytes),
        kept=counters.num_kept,
        refused=counters.num_refused,
        evicted=counters.num_evicted,
        restored=counters.num_hits,
        restored_tokens=counters.hit_tokens,
        restored_bytes=counters.copied_bytes,
    )
