"""What a byte budget gives: how many requests at what context, computed before anything runs."""

import math
from bisect import bisect_right
from dataclasses import dataclass

from sevenfold.config import ConfigError
from sevenfold.engine.memory_cost import PrefillCost
from sevenfold.engine.memory_layout import ArenaLayout, Tenant
from sevenfold.engine.precision import (
    SnapshotDtype,
    StateDtype,
    StateFormat,
    check_state_dtype,
    linear_layers,
    snapshot_formats,
)
from sevenfold.engine.state_layout import RING_TOKENS, StateLayout, lay_out_states
from sevenfold.models import ModelConfig

_SLAB_ALIGNMENT_BYTES = 512
# Triton loads by vectors where strides are known to be multiples of 16 elements, of fp32 at most.
_ITEM_ALIGNMENT_BYTES = 64
RING_COUNT_BYTES = 4  # int32
_MAX_GROWTH = 16  # a slab grows by a 16th at most to hold one more snapshot
_MOST_PER_SLAB = 3  # of its largest items, where that leaves at least a 16th less of it empty


@dataclass(frozen=True)
class MemoryPlan:
    """How a budget is cut, and what it gives.

    state: one request's linear state, with its ring if it is int8; empty without linear layers.
    page_bytes: keys and values of page_tokens tokens in all softmax layers; 0 without them.
    snapshot: one cached state.
    ring_tokens: drafts' keys and values that a state keeps beside it; 0 where nobody speculates.
    ring_bytes: what they take of a state's place beside it, all linear layers; int8 states have
        them in their own ring.
    host: slabs of the same kind in the host's memory, for cached prefixes that have to make room;
        None keeps none.
    """

    budget_bytes: int
    page_tokens: int
    state_dtype: StateDtype
    snapshot_dtype: SnapshotDtype
    state: StateLayout
    page_bytes: int
    snapshot: StateLayout
    layout: ArenaLayout
    cost: PrefillCost
    ring_tokens: int = 0
    ring_bytes: int = 0
    host: ArenaLayout | None = None

    @property
    def host_bytes(self) -> int:
        """Bytes of the host's memory."""
        return 0 if self.host is None else self.host.num_slabs * self.host.slab_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of one request's linear state."""
        return self.state.num_bytes

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of one cached state."""
        return self.snapshot.num_bytes

    @property
    def has_states(self) -> bool:
        """Whether a request has a linear state."""
        return self.state_bytes > 0

    @property
    def has_pages(self) -> bool:
        """Whether a request has keys and values."""
        return self.page_bytes > 0

    @property
    def smallest_cacheable_prefix_tokens(self) -> int:
        """Fewest tokens that a request can have in common with an earlier one and not compute.

        An engine that is batch-invariant keeps whole chunks alone: SchedulerConfig.grain_tokens.
        """
        return self.page_tokens

    @property
    def longest_context_tokens(self) -> int | None:
        """Tokens that one request alone may reach; None when none is too many."""
        if not self.has_pages:
            return None
        slabs = self.layout.num_usable_slabs - self.has_states
        return slabs * self.layout.places[Tenant.PAGE] * self.page_tokens

    def num_pages(self, num_tokens: int) -> int:
        """Pages that a request of so many tokens holds."""
        return -(-num_tokens // self.page_tokens) if self.has_pages else 0

    def request_bytes(self, num_tokens: int) -> int:
        """Bytes of a request's state, of its drafts and of its pages."""
        return self.state_bytes + self.ring_bytes + self.num_pages(num_tokens) * self.page_bytes

    def concurrency(self, context_tokens: int) -> int:
        """How many requests of that many tokens, with nothing in common, fit side by side."""
        usable = self.layout.num_usable_slabs
        most = usable * max(self.layout.places)
        return bisect_right(range(most), usable, key=lambda n: self._slabs(n + 1, context_tokens))

    def _slabs(self, num_requests: int, context_tokens: int) -> int:
        states = num_requests if self.has_states else 0
        pages = num_requests * self.num_pages(context_tokens)
        in_states = self.layout.num_slabs_for(Tenant.STATE, states)
        return in_states + self.layout.num_slabs_for(Tenant.PAGE, pages)


def plan_memory(
    config: ModelConfig,
    *,
    budget_bytes: int,
    context_tokens: int,
    page_tokens: int = 64,
    state_dtype: StateDtype = "fp32",
    snapshot_dtype: SnapshotDtype = "fp32",
    kv_element_bytes: int = 2,
    ring_tokens: int = 0,
    host_bytes: int = 0,
) -> MemoryPlan:
    """Cut a byte budget into slabs for states, pages and snapshots.

    slab = max(state + ring, page, snapshot), rounded up to 512 bytes and to whole strides (or two
    or three of the largest, where that wastes less); slab 0 is the sink

    Args:
        config: the model; without linear, or without softmax layers, it has no states, or no pages.
        budget_bytes: for all three together.
        context_tokens: tokens that a request must be able to reach, 1 or more.
        page_tokens: tokens of a page: a multiple of 16 from 16 to 64.
        state_dtype: of active states; int8 with a ring of 16 exact tokens.
        snapshot_dtype: of cached states; "auto" chooses for each head (snapshot_formats).
        kv_element_bytes: of one element of keys and values; 2 for bf16.
        ring_tokens: tokens of drafts that a linear state keeps beside it, 0 or more:
            speculation's RING_TOKENS where requests speculate.
        host_bytes: of the host's memory, for cached prefixes that have to make room; 0 keeps none.

    Returns:
        The plan.

    Raises:
        ConfigError: page_tokens or context_tokens breaks its rule, state_dtype is bf16 and would
            erase a head's horizon, the budget cannot hold one request of context_tokens, or
            host_bytes no cached prefix; the message shows the arithmetic.
    """
    if page_tokens not in range(16, 65, 16):
        raise ConfigError(f"page_tokens must be a multiple of 16 from 16 to 64, got {page_tokens}")
    if context_tokens < 1:
        raise ConfigError(f"context_tokens must be 1 or more, got {context_tokens}")
    check_state_dtype(config, state_dtype)
    states = _active_layout(config, state_dtype, kv_element_bytes, ring_tokens)
    snapshots = lay_out_states(
        config,
        snapshot_formats(config, snapshot_dtype),
        token_bytes=kv_element_bytes,
        ring_tokens=None,
    )
    state, snapshot = states.num_bytes, snapshots.num_bytes
    page = page_tokens * _kv_bytes_per_token(config, kv_element_bytes)
    # An int8 state has a ring of its own, and takes drafts into it.
    own_tokens = 0 if state_dtype == "int8" else ring_tokens
    ring = _ring_bytes(config, own_tokens, kv_element_bytes)
    slab, places = _cut(state + ring, page, snapshot)
    num_slabs = budget_bytes // slab
    needed = 1 + (state > 0) + _page_slabs(context_tokens, page_tokens, places[Tenant.PAGE])
    if num_slabs < needed:
        needs = (state + ring, page, -(-context_tokens // page_tokens), slab)
        raise ConfigError(_refusal(budget_bytes, context_tokens, needs, needed))
    return MemoryPlan(
        budget_bytes=budget_bytes,
        page_tokens=page_tokens,
        state_dtype=state_dtype,
        snapshot_dtype=snapshot_dtype,
        state=states,
        page_bytes=page,
        snapshot=snapshots,
        layout=ArenaLayout(num_slabs, slab, places),
        cost=PrefillCost.of(config),
        ring_tokens=ring_tokens,
        ring_bytes=ring,
        host=_host_layout(host_bytes, slab, places),
    )


def _host_layout(host_bytes: int, slab: int, places: tuple[int, int, int]) -> ArenaLayout | None:
    """Slabs for a snapshot and for its pages at least; the first is nobody's, as on the device."""
    if not host_bytes:
        return None
    least = 1 + sum(places[tenant] > 0 for tenant in (Tenant.PAGE, Tenant.SNAPSHOT))
    if host_bytes < least * slab:
        raise ConfigError(
            f"host_bytes must be 0 or hold {least} slabs of {slab:,} = {least * slab:,} bytes, got "
            f"{host_bytes:,}"
        )
    return ArenaLayout(host_bytes // slab, slab, places)


def _kv_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """Every softmax layer keeps every token: a window's pages outside it serve the prefix cache."""
    layers = config.count("full_attention") + config.count("sliding_attention")
    return layers * 2 * config.num_key_value_heads * config.head_dim * element_bytes


def _active_layout(
    config: ModelConfig, dtype: StateDtype, token_bytes: int, draft_tokens: int
) -> StateLayout:
    heads: tuple[StateFormat, ...] = (dtype,) * config.num_attention_heads
    formats = [heads] * len(linear_layers(config))
    ring = RING_TOKENS + draft_tokens if dtype == "int8" else None
    return lay_out_states(config, formats, token_bytes=token_bytes, ring_tokens=ring)


def _ring_bytes(config: ModelConfig, ring_tokens: int, element_bytes: int) -> int:
    """Keys and values of draft tokens, and in each head how many of them count already."""
    heads = config.count("linear_attention") * config.num_attention_heads
    per_head = 2 * ring_tokens * config.head_dim * element_bytes + RING_COUNT_BYTES
    size = heads * per_head if ring_tokens else 0
    return -(-size // _ITEM_ALIGNMENT_BYTES) * _ITEM_ALIGNMENT_BYTES


def _cut(state: int, page: int, snapshot: int) -> tuple[int, tuple[int, int, int]]:
    """Bytes of a slab, and how many states, pages and snapshots fit into it."""
    sizes = (state, page, snapshot)
    slab = _slab_bytes(max(sizes), snapshot)
    for multiple in range(2, _MOST_PER_SLAB + 1):
        larger = _slab_bytes(multiple * max(sizes), snapshot)
        if (_waste(slab, sizes) - _waste(larger, sizes)) * _MAX_GROWTH >= 1:
            slab = larger
    states, pages, snapshots = (slab // size if size else 0 for size in sizes)
    strides = [_ITEM_ALIGNMENT_BYTES * places for places in (states, pages, snapshots) if places]
    multiple = math.lcm(_SLAB_ALIGNMENT_BYTES, *strides)
    return -(-slab // multiple) * multiple, (states, pages, snapshots)


def _slab_bytes(least: int, snapshot: int) -> int:
    """The least, or a little more where that makes room for one more snapshot."""
    if snapshot:
        more = -(-least // snapshot) * snapshot
        least = more if (more - least) * _MAX_GROWTH <= least else least
    return -(-least // _SLAB_ALIGNMENT_BYTES) * _SLAB_ALIGNMENT_BYTES


def _waste(slab: int, sizes: tuple[int, int, int]) -> float:
    """The larger share of a slab that its states, or its snapshots, leave empty."""
    return max(slab % size / slab if size else 0 for size in (sizes[0], sizes[2]))


def _page_slabs(num_tokens: int, page_tokens: int, pages_per_slab: int) -> int:
    if not pages_per_slab:
        return 0
    return -(-num_tokens // (page_tokens * pages_per_slab))


def _refusal(budget: int, tokens: int, needs: tuple[int, int, int, int], num_slabs: int) -> str:
    state, page, num_pages, slab = needs
    parts = [f"a sink of {slab:,}"]
    if state:
        parts.append(f"a state of {state:,}")
    if page:
        parts.append(f"{num_pages:,} pages of {page:,}")
    return (
        f"budget_bytes must hold one request of {tokens:,} tokens: {' + '.join(parts)} bytes in "
        f"{num_slabs:,} slabs of {slab:,} = {num_slabs * slab:,} bytes, got {budget:,}, which is "
        f"{budget // slab:,} slabs"
    )
