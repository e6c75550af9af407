"""What /metrics says, in Prometheus' form: counts of the server's own, gauges of the engine's."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from sevenfold.server.engine_protocol import EngineStats, ServingEngine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_GAUGES = {
    "sevenfold_requests_running": ("running", "Outputs being computed."),
    "sevenfold_effective_concurrency": (
        "effective_concurrency",
        "Requests of full length that memory holds at a time.",
    ),
    "sevenfold_longest_context_tokens": (
        "longest_context_tokens",
        "Prompt and output of one request at most.",
    ),
    "sevenfold_sessions": ("sessions", "Conversations that keep their prefix."),
}
_COUNTERS = {
    "sevenfold_cache_queried_tokens": ("prompt_tokens", "Prompt tokens looked up in the cache."),
    "sevenfold_cache_hit_tokens": ("cached_tokens", "Prompt tokens found in the cache."),
    "sevenfold_cache_potential_tokens": (
        "potential_tokens",
        "Prompt tokens computed although they had been seen: no state with them, or evicted.",
    ),
    "sevenfold_recomputed_tokens": (
        "recomputed_tokens",
        "Tokens computed again after a preemption.",
    ),
    "sevenfold_engine_steps": ("steps", "Steps that computed something."),
    "sevenfold_snapshots_taken": ("snapshots_taken", "States that were cached."),
    "sevenfold_snapshots_refused": (
        "snapshots_refused",
        "States that were due, and not worth their memory.",
    ),
    "sevenfold_pages_dropped": (
        "pages_dropped",
        "Cached pages that no snapshot reached any more.",
    ),
    "sevenfold_drafts": ("drafts", "Times that guesses were checked."),
    "sevenfold_snapshots_evicted": ("snapshots_evicted", "Snapshots that made room."),
    "sevenfold_preemptions": ("preemptions", "Outputs that had to wait again."),
    "sevenfold_nonfinite_outputs": (
        "nonfinite_outputs",
        "Outputs that failed because their logits were not finite.",
    ),
    "sevenfold_drafted_tokens": ("drafted_tokens", "Tokens guessed by speculation."),
    "sevenfold_accepted_tokens": ("accepted_tokens", "Guessed tokens that were right."),
}
_HOST_COUNTERS = {
    "sevenfold_host_prefixes_kept": ("kept", "Evicted prefixes that the host's memory took."),
    "sevenfold_host_prefixes_refused": ("refused", "Those that it had no room for."),
    "sevenfold_host_prefixes_evicted": ("evicted", "Those that made room there."),
    "sevenfold_host_prefixes_restored": ("restored", "Those that came back for a request."),
    "sevenfold_host_restored_tokens": ("restored_tokens", "Prompt tokens found there alone."),
    "sevenfold_host_restored_bytes": ("restored_bytes", "Copied back to the device."),
}
_POOLS = ("slabs", "pages", "states", "snapshots")


class Metrics:
    """The counts of one server."""

    def __init__(self, engine: ServingEngine, *, exact_misses: bool) -> None:
        """Begin to count.

        Args:
            engine: asked whenever somebody reads the metrics.
            exact_misses: whether whoever may read them may learn that callers under another salt
                have sent the same prompt.
        """
        self._registry = CollectorRegistry()
        registry = self._registry
        self.responses = Counter(
            "sevenfold_http_responses",
            "Responses by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self.outputs = Counter(
            "sevenfold_outputs",
            "Ended outputs: stop, length, tool_calls, cancelled, deadline or error.",
            ["reason"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "sevenfold_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.cached_tokens = Counter(
            "sevenfold_cached_tokens", "Those found in the prefix cache.", registry=registry
        )
        self.new_tokens = Counter(
            "sevenfold_generated_tokens", "Tokens generated.", registry=registry
        )
        self.misses = Counter(
            "sevenfold_cache_misses", "Prompts that found nothing, as told.", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.queue = self._seconds("queue", "From an output's admission to its first step.")
        self.prefill = self._seconds("prefill", "From an output's first step to its first token.")
        self.first_token = self._seconds("time_to_first_token", "Until an output's first token.")
        self.next_token = self._seconds("inter_token", "Between tokens of an output.")
        self.decode = self._seconds("decode", "From an output's first token to its last.")
        self.whole = self._seconds("request", "From a request's admission to its end.")
        self.under_way = Gauge(
            "sevenfold_outputs_under_way", "Admitted and not ended.", registry=registry
        )
        self.most = Gauge(
            "sevenfold_outputs_limit", "Beyond it requests get 429.", registry=registry
        )
        registry.register(_EngineCollector(engine, exact_misses))

    def text(self) -> bytes:
        """Return everything in Prometheus' text form."""
        return generate_latest(self._registry)

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(
            f"sevenfold_{name}_seconds", what, buckets=_SECONDS, registry=self._registry
        )


class _EngineCollector:
    """Asks the engine whenever somebody reads the metrics."""

    def __init__(self, engine: ServingEngine, exact_misses: bool) -> None:
        self._engine, self._exact_misses = engine, exact_misses

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, (field, what) in _GAUGES.items():
            yield GaugeMetricFamily(name, what, value=getattr(stats, field))
        for name, (field, what) in _COUNTERS.items():
            yield CounterMetricFamily(name, what, value=getattr(stats, field))
        yield _misses(stats.misses, self._exact_misses)
        yield _labelled(
            "sevenfold_requests_waiting", "By what keeps the first.", "reason", stats.waiting
        )
        yield _labelled(
            "sevenfold_memory_bytes", "By what holds them.", "tenant", stats.memory_bytes
        )
        if stats.smallest_cacheable_prefix_tokens is not None:
            yield GaugeMetricFamily(
                "sevenfold_smallest_cacheable_prefix_tokens",
                "Shared tokens from which the cache hits.",
                value=stats.smallest_cacheable_prefix_tokens,
            )
        if stats.host is not None:
            for name, (field, what) in _HOST_COUNTERS.items():
                yield CounterMetricFamily(name, what, value=getattr(stats.host, field))
        yield from _pools(stats)


def _misses(misses: Mapping[str, int], exact: bool) -> CounterMetricFamily:
    shown = dict(misses)
    if not exact:
        shown["no_kv"] = shown.pop("other_salt", 0) + shown.get("no_kv", 0)
    name, what = "sevenfold_prefix_misses", "Prompts that found nothing cached, by why."
    family = CounterMetricFamily(name, what, labels=["reason"])
    for reason, count in shown.items():
        family.add_metric([reason], count)
    return family


def _pools(stats: EngineStats) -> Iterator[Metric]:
    pools = {name: getattr(stats, name) for name in _POOLS}
    if stats.host is not None:
        pools["host"] = stats.host.slabs
    for field in ("used", "total", "bytes_each"):
        values = {name: getattr(pool, field) for name, pool in pools.items()}
        yield _labelled(f"sevenfold_pool_{field}", "Places of a kind of memory.", "pool", values)


def _labelled(name: str, what: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, what, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
