"""The arena as tensors: each layer's states, pages and snapshots are strided views of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.engine.cache import Copy, Fresh
from sevenfold.engine.exact_items import ExactItems
from sevenfold.engine.item_words import item_words
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.memory_layout import ArenaLayout, Tenant
from sevenfold.engine.precision import linear_layers
from sevenfold.engine.state_drafts import DraftRings, Int8Rings, RoundedRings
from sevenfold.engine.state_layout import Section, StateLayout
from sevenfold.engine.state_pool import (
    ActiveStates,
    HeadGroup,
    RingStates,
    RoundedStates,
    StatePool,
)
from sevenfold.engine.transfer import upload
from sevenfold.models import ModelConfig
from sevenfold.ops import Int8ReplayPool, ReplayPool, layer_log_decay

_FEW_ITEMS = 4  # as many launches take the host no longer than to send where they lie

_DTYPES = {
    "fp32": torch.float32,
    "int32": torch.int32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class LinearStorage:
    """A lightning-attention layer's active states [items, H, K, V] fp32, and its snapshots.

    drafts: the states with their rings; None where nobody speculates.
    """

    states: Tensor
    snapshots: StatePool
    drafts: ReplayPool | None

    def read_states(self, slots: Tensor) -> Tensor:
        """Return active states, [N, H, K, V] fp32."""
        return self.states[slots]

    def write_states(self, slots: Tensor, states: Tensor) -> None:
        """Replace active states, which lack nothing then."""
        self.states[slots] = states
        self._settle(slots)

    def snapshot(self, slots: Tensor, items: Tensor) -> None:
        """Round active states into snapshots, where they lie."""
        self.snapshots.copy_from(self.states, slots, items)

    def restore(self, items: Tensor, slots: Tensor) -> None:
        """Replace active states by snapshots, where they lie."""
        self.snapshots.copy_to(self.states, slots, items)
        self._settle(slots)

    def _settle(self, slots: Tensor) -> None:
        if self.drafts is not None:
            self.drafts.count[slots] = 0


@dataclass(frozen=True)
class EncodedStorage:
    """A lightning-attention layer's active states in less than fp32, and its snapshots.

    drafts: the states with their rings; None where nobody speculates.
    """

    states: ActiveStates
    snapshots: StatePool
    drafts: DraftRings | None

    def read_states(self, slots: Tensor) -> Tensor:
        """Return active states, [N, H, K, V] fp32."""
        return self.states.read(slots)

    def write_states(self, slots: Tensor, states: Tensor) -> None:
        """Replace active states, rounded, which lack nothing then."""
        self.states.write(slots, states)
        if isinstance(self.drafts, RoundedRings):
            self.drafts.forget(slots)

    def snapshot(self, slots: Tensor, items: Tensor) -> None:
        """Round active states into snapshots."""
        self.snapshots.write(items, self.states.read(slots))

    def restore(self, items: Tensor, slots: Tensor) -> None:
        """Replace active states by snapshots, rounded again."""
        self.states.write(slots, self.snapshots.read(items))


@dataclass(frozen=True)
class KVStorage:
    """Keys and values of one softmax layer, each [pages, page_tokens, G, D]."""

    k: Tensor
    v: Tensor


class Storage:
    """One allocation of the plan's slabs, and every layer's views of it.

    words: by which a recorded run copies a state and clears pages itself; None where it cannot.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: MemoryPlan,
        *,
        device: torch.device,
        dtype: torch.dtype,
        decays: Sequence[Tensor] | None = None,
    ) -> None:
        """Allocate the arena, zeroed.

        Args:
            config: the model that the plan was made for.
            plan: with kv_element_bytes of dtype.
            device: the model's.
            dtype: of keys and values: the model's; bf16, fp16 or fp32.
            decays: [H] fp32 log decays of each linear layer's heads, on the device; None takes
                those of a whole model.

        Raises:
            UnsupportedError: the model's dtype is fp64.
        """
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UnsupportedError(f"the model must be bf16, fp16 or fp32 to serve, got {dtype}")
        self.layout = plan.layout
        size = plan.layout.num_slabs * plan.layout.slab_bytes
        self._arena = _zeros(size, device)
        if decays is None:
            decays = _decays(config, device)
        self.layers = tuple(_layers(config, plan, self._arena, dtype, decays))
        self._wide = {
            tenant: _wide(self._arena, plan.layout, tenant)
            for tenant in (Tenant.STATE, Tenant.PAGE)
        }
        self._exact = _exact_items(config, plan, self._arena, dtype) if self.is_exact else None
        self.words = item_words(self._arena, plan) if self.is_exact else None
        self._host = None if plan.host is None else _host_arena(plan.host_bytes, device)

    @property
    def has_states(self) -> bool:
        """Whether there are layers with states."""
        return any(not isinstance(layer, KVStorage) for layer in self.layers)

    @property
    def is_exact(self) -> bool:
        """Whether every state and snapshot is fp32."""
        linear = [layer for layer in self.layers if not isinstance(layer, KVStorage)]
        return all(isinstance(x, LinearStorage) and x.snapshots.exact is not None for x in linear)

    def zero(self, fresh: Fresh) -> None:
        """Clear items that were handed out."""
        for tenant, items in ((Tenant.STATE, fresh.states), (Tenant.PAGE, fresh.pages)):
            if items:
                rows = self._wide[tenant]
                if len(items) <= _FEW_ITEMS:
                    for item in items:
                        rows[item].zero_()
                else:
                    # Not by an index with a value: that is sent to the device, which is waited for.
                    rows.index_fill_(0, upload(items, rows.device), 0)

    def save(self, copies: Sequence[Copy]) -> None:
        """Copy items to the host; nothing waits for it."""
        for device, host in self._copied(copies):
            host.copy_(device, non_blocking=True)

    def load(self, copies: Sequence[Copy]) -> None:
        """Copy items from the host; nothing waits for it, and what runs next reads them."""
        for device, host in self._copied(copies):
            device.copy_(host, non_blocking=True)

    def _copied(self, copies: Sequence[Copy]) -> Iterator[tuple[Tensor, Tensor]]:
        """The bytes of each item, on the device and on the host."""
        for tenant, device, host in copies:
            if self._host is None:
                raise AssertionError("a plan without a host's memory has no copies")
            size = self.layout.stride_bytes(tenant)
            yield self._arena[device * size :][:size], self._host[host * size :][:size]

    def restore(self, snapshots: Sequence[int], states: Sequence[int]) -> None:
        """Copy snapshots into states."""
        if self._exact is not None:
            self._exact.restore(snapshots, states)
            return
        for layer, (source, target) in self._linear(snapshots, states):
            layer.restore(source, target)

    def snapshot(self, states: Sequence[int], snapshots: Sequence[int]) -> None:
        """Copy states into snapshots, rounded to their precision."""
        if self._exact is not None:
            self._exact.snapshot(states, snapshots)
            return
        for layer, (source, target) in self._linear(states, snapshots):
            layer.snapshot(source, target)

    def _linear(
        self, source: Sequence[int], target: Sequence[int]
    ) -> Iterator[tuple[LinearStorage | EncodedStorage, tuple[Tensor, Tensor]]]:
        """Each lightning-attention layer, with the items on its device; none without items."""
        if not source:
            return
        items = tuple(upload(ids, self._arena.device) for ids in (source, target))
        for layer in self.layers:
            if not isinstance(layer, KVStorage):
                yield layer, (items[0], items[1])


def _wide(arena: Tensor, layout: ArenaLayout, tenant: Tenant) -> Tensor:
    """All items of a tenant, [items, n], in the widest integers that divide them."""
    size = layout.stride_bytes(tenant)
    wide = arena.numel() % 8 == size % 8 == 0
    dtype = torch.int64 if wide else torch.uint8
    return _pool(arena, layout, tenant, 0, dtype, (size // dtype.itemsize,))


def _decays(config: ModelConfig, device: torch.device) -> list[Tensor]:
    H, L = config.num_attention_heads, config.num_hidden_layers
    return [layer_log_decay(H, layer, L).to(device) for layer in linear_layers(config)]


def _exact_items(
    config: ModelConfig, plan: MemoryPlan, arena: Tensor, dtype: torch.dtype
) -> ExactItems | None:
    """Views by which a state is copied at once, not layer by layer: each layer is a launch."""
    if not plan.has_states or plan.state.sections != plan.snapshot.sections:
        return None
    shape = (plan.state.num_bytes,)
    where = [(tenant, 0, torch.uint8, shape) for tenant in (Tenant.STATE, Tenant.SNAPSHOT)]
    states, snapshots = (_pool(arena, plan.layout, *each) for each in where)
    counts = _ring_counts(config, plan, arena, dtype) if plan.ring_tokens else None
    return ExactItems(states, snapshots, counts)


def _host_arena(num_bytes: int, device: torch.device) -> Tensor:
    """Bytes of the host's memory; beside a GPU they are pinned, so that no copy waits."""
    if device.type == "cuda":
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    return _zeros(num_bytes, torch.device("cpu"))


def _zeros(num_bytes: int, device: torch.device) -> Tensor:
    """Zeroed bytes; on a CPU NumPy's, which the system hands out page by page as they are used."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8))
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def _layers(
    config: ModelConfig,
    plan: MemoryPlan,
    arena: Tensor,
    dtype: torch.dtype,
    decays: Sequence[Tensor],
):
    """Each layer's views; items lay their layers out one after another."""
    G, D = config.num_key_value_heads, config.head_dim
    linear = iter(_linear_layers(config, plan, arena, dtype, decays))
    page_at, page_shape = 0, (plan.page_tokens, G, D)
    page_bytes = plan.page_tokens * G * D * dtype.itemsize
    for kind in config.layer_types:
        if kind == "linear_attention":
            yield next(linear)
            continue
        offsets = (page_at, page_at + page_bytes)
        yield KVStorage(
            *(
                _pool(arena, plan.layout, Tenant.PAGE, offset, dtype, page_shape)
                for offset in offsets
            )
        )
        page_at += 2 * page_bytes


def _linear_layers(
    config: ModelConfig,
    plan: MemoryPlan,
    arena: Tensor,
    dtype: torch.dtype,
    decays: Sequence[Tensor],
) -> Iterator[LinearStorage | EncodedStorage]:
    """The lightning-attention layers' views."""
    H, rings = config.num_attention_heads, plan.ring_tokens > 0
    for n in range(config.count("linear_attention")):
        active = _arrays(arena, plan.layout, Tenant.STATE, plan.state, n, dtype)
        cached = _arrays(arena, plan.layout, Tenant.SNAPSHOT, plan.snapshot, n, dtype)
        snapshots = StatePool(tuple(_groups(cached, H)))
        if plan.state_dtype == "fp32":
            [(_, states)] = active
            drafts = ReplayPool(states, *_rings(config, plan, arena, dtype, n)) if rings else None
            yield LinearStorage(states, snapshots, drafts)
        elif plan.state_dtype == "int8":
            named = {section.part: view for section, view in active}
            pool = Int8ReplayPool(**named)
            drafts = Int8Rings(pool) if rings else None
            yield EncodedStorage(RingStates(pool, decays[n]), snapshots, drafts)
        else:
            pool = StatePool(tuple(_groups(active, H)))
            drafts = RoundedRings(pool, *_rings(config, plan, arena, dtype, n)) if rings else None
            yield EncodedStorage(RoundedStates(pool), snapshots, drafts)


def _arrays(
    arena: Tensor,
    layout: ArenaLayout,
    tenant: Tenant,
    states: StateLayout,
    layer: int,
    token_dtype: torch.dtype,
) -> list[tuple[Section, Tensor]]:
    """One linear layer's sections of a tenant's items, each [items, *shape]."""
    return [
        (section, _pool(arena, layout, tenant, at, _DTYPES.get(section.element, token_dtype),
                        section.shape))
        for at, section in states.sections
        if section.layer == layer
    ]  # fmt: skip


def _groups(arrays: list[tuple[Section, Tensor]], num_heads: int) -> Iterator[HeadGroup]:
    """The heads' codes with their scales."""
    scales = {section.heads: view for section, view in arrays if section.part == "scale"}
    for section, codes in arrays:
        if section.part == "codes":
            heads = None if len(section.heads) == num_heads else section.heads
            yield HeadGroup(heads, codes, scales.get(section.heads))


def _rings(
    config: ModelConfig, plan: MemoryPlan, arena: Tensor, dtype: torch.dtype, linear: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and count of the rings of the linear layer of that number.

    Behind the states of all layers lie the keys and values of all, and then the counts of all.
    """
    H = config.num_attention_heads
    shape = (H, plan.ring_tokens, config.head_dim)
    ring_bytes = prod(shape) * dtype.itemsize
    rings_at = [plan.state_bytes + (2 * linear + n) * ring_bytes for n in range(2)]
    ring_k, ring_v = (_pool(arena, plan.layout, Tenant.STATE, at, dtype, shape) for at in rings_at)
    counts = _ring_counts(config, plan, arena, dtype)
    return ring_k, ring_v, counts[:, linear * H : (linear + 1) * H]


def _ring_counts(
    config: ModelConfig, plan: MemoryPlan, arena: Tensor, dtype: torch.dtype
) -> Tensor:
    """Tokens in the rings of each state, of all layers, [items, layers * H] int32."""
    H, num_layers = config.num_attention_heads, config.count("linear_attention")
    ring_bytes = H * plan.ring_tokens * config.head_dim * dtype.itemsize
    count_at = plan.state_bytes + 2 * num_layers * ring_bytes
    return _pool(arena, plan.layout, Tenant.STATE, count_at, torch.int32, (num_layers * H,))


def _pool(
    arena: Tensor,
    layout: ArenaLayout,
    tenant: Tenant,
    offset_bytes: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> Tensor:
    """All items of a tenant, [items, *shape], at an offset within each."""
    size = dtype.itemsize
    items = layout.num_slabs * layout.places[tenant]
    inner = torch.empty(shape, device="meta").stride()
    stride = layout.stride_bytes(tenant) // size
    return arena.view(dtype).as_strided((items, *shape), (stride, *inner), offset_bytes // size)
