"""What a byte budget gives: how many requests at what context, computed before anything runs."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from sevenfold.config import ConfigError
from sevenfold.engine.memory_cost import PrefillCost
from sevenfold.engine.memory_layout import ArenaLayout, Tenant
from sevenfold.models import ModelConfig
from sevenfold.models.accounting import state_bytes

SnapshotDtype = Literal["fp32", "fp16", "int8"]

_SLAB_ALIGNMENT_BYTES = 512
_ITEM_ALIGNMENT_BYTES = 16  # the widest load of a GPU thread
_SCALE_BYTES = 4  # int8 keeps one fp32 scale for each head and key channel
RING_COUNT_BYTES = 4  # int32
_MAX_GROWTH = 16  # a slab grows by a 16th at most to hold one more snapshot


@dataclass(frozen=True)
class MemoryPlan:
    """How a budget is cut, and what it gives.

    state_bytes: one request's linear state, fp32; 0 without linear layers.
    page_bytes: keys and values of page_tokens tokens in all softmax layers; 0 without them.
    snapshot_bytes: one cached state.
    ring_tokens: drafts' keys and values that a state keeps beside it; 0 where nobody speculates.
    ring_bytes: what they take of a state's place, all linear layers.
    """

    budget_bytes: int
    page_tokens: int
    snapshot_dtype: SnapshotDtype
    state_bytes: int
    page_bytes: int
    snapshot_bytes: int
    layout: ArenaLayout
    cost: PrefillCost
    ring_tokens: int = 0
    ring_bytes: int = 0

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
        """Fewest tokens that a request can have in common with an earlier one and not compute."""
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
    snapshot_dtype: SnapshotDtype = "fp32",
    kv_element_bytes: int = 2,
    ring_tokens: int = 0,
) -> MemoryPlan:
    """Cut a byte budget into slabs for states, pages and snapshots.

    slab = max(state + ring, page), rounded up to 512 bytes and to whole strides; slab 0 is the sink

    Args:
        config: the model; without linear, or without softmax layers, it has no states, or no pages.
        budget_bytes: for all three together.
        context_tokens: tokens that a request must be able to reach, 1 or more.
        page_tokens: tokens of a page: a multiple of 16 from 16 to 64.
        snapshot_dtype: of cached states; int8 with one fp32 scale for each head and key channel.
        kv_element_bytes: of one element of keys and values; 2 for bf16.
        ring_tokens: tokens of drafts that a linear state keeps beside it, 0 or more:
            speculation's RING_TOKENS where requests speculate.

    Returns:
        The plan.

    Raises:
        ConfigError: page_tokens or context_tokens breaks its rule, or the budget cannot hold one
            request of context_tokens; the message shows the arithmetic.
    """
    if page_tokens not in range(16, 65, 16):
        raise ConfigError(f"page_tokens must be a multiple of 16 from 16 to 64, got {page_tokens}")
    if context_tokens < 1:
        raise ConfigError(f"context_tokens must be 1 or more, got {context_tokens}")
    state = state_bytes(config)
    page = page_tokens * _kv_bytes_per_token(config, kv_element_bytes)
    snapshot = _snapshot_bytes(config, snapshot_dtype)
    ring = _ring_bytes(config, ring_tokens, kv_element_bytes)
    slab, places = _cut(state + ring, page, snapshot)
    num_slabs = budget_bytes // slab
    needed = 1 + (state > 0) + _page_slabs(context_tokens, page_tokens, places[Tenant.PAGE])
    if num_slabs < needed:
        needs = (state + ring, page, -(-context_tokens // page_tokens), slab)
        raise ConfigError(_refusal(budget_bytes, context_tokens, needs, needed))
    return MemoryPlan(
        budget_bytes=budget_bytes,
        page_tokens=page_tokens,
        snapshot_dtype=snapshot_dtype,
        state_bytes=state,
        page_bytes=page,
        snapshot_bytes=snapshot,
        layout=ArenaLayout(num_slabs, slab, places),
        cost=PrefillCost.of(config),
        ring_tokens=ring_tokens,
        ring_bytes=ring,
    )


def _kv_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """Every softmax layer keeps every token: a window's pages outside it serve the prefix cache."""
    layers = config.count("full_attention") + config.count("sliding_attention")
    return layers * 2 * config.num_key_value_heads * config.head_dim * element_bytes


def _ring_bytes(config: ModelConfig, ring_tokens: int, element_bytes: int) -> int:
    """Keys and values of draft tokens, and in each head how many of them count already."""
    heads = config.count("linear_attention") * config.num_attention_heads
    per_head = 2 * ring_tokens * config.head_dim * element_bytes + RING_COUNT_BYTES
    size = heads * per_head if ring_tokens else 0
    return -(-size // _ITEM_ALIGNMENT_BYTES) * _ITEM_ALIGNMENT_BYTES


def _snapshot_bytes(config: ModelConfig, dtype: SnapshotDtype) -> int:
    state = state_bytes(config)
    if dtype == "fp32":
        return state
    if dtype == "fp16":
        return state // 2
    scales = config.count("linear_attention") * config.num_attention_heads * config.head_dim
    return state // 4 + scales * _SCALE_BYTES


def _cut(state: int, page: int, snapshot: int) -> tuple[int, tuple[int, int, int]]:
    """Bytes of a slab, and how many states, pages and snapshots fit into it."""
    least = max(state, page)
    if snapshot:
        more = -(-least // snapshot) * snapshot
        least = more if (more - least) * _MAX_GROWTH <= least else least
    slab = -(-least // _SLAB_ALIGNMENT_BYTES) * _SLAB_ALIGNMENT_BYTES
    states, pages, snapshots = (slab // size if size else 0 for size in (state, page, snapshot))
    strides = [_ITEM_ALIGNMENT_BYTES * places for places in (states, pages, snapshots) if places]
    multiple = math.lcm(_SLAB_ALIGNMENT_BYTES, *strides)
    return -(-slab // multiple) * multiple, (states, pages, snapshots)


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
