"""The arena as tensors: each layer's states, pages and snapshots are strided views of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.engine.cache import Fresh
from sevenfold.engine.memory import RING_COUNT_BYTES, MemoryPlan
from sevenfold.engine.memory_layout import ArenaLayout, Tenant
from sevenfold.models import ModelConfig
from sevenfold.ops import ReplayPool


@dataclass(frozen=True)
class LinearStorage:
    """Active states and snapshots of one lightning-attention layer, each [items, H, K, V] fp32.

    drafts: the states with their rings; None where nobody speculates.
    """

    states: Tensor
    snapshots: Tensor
    drafts: ReplayPool | None


@dataclass(frozen=True)
class KVStorage:
    """Keys and values of one softmax layer, each [pages, page_tokens, G, D]."""

    k: Tensor
    v: Tensor


class Storage:
    """One allocation of the plan's slabs, and every layer's views of it."""

    def __init__(
        self, config: ModelConfig, plan: MemoryPlan, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Allocate the arena, zeroed.

        Args:
            config: the model that the plan was made for.
            plan: with fp32 snapshots, and kv_element_bytes of dtype.
            device: the model's.
            dtype: of keys and values: the model's; bf16, fp16 or fp32.

        Raises:
            UnsupportedError: the plan's snapshots are not fp32, or the model's dtype is fp64.
        """
        if plan.snapshot_dtype != "fp32":
            raise UnsupportedError(f"snapshot_dtype must be fp32, got {plan.snapshot_dtype}")
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UnsupportedError(f"the model must be bf16, fp16 or fp32 to serve, got {dtype}")
        self.layout = plan.layout
        size = plan.layout.num_slabs * plan.layout.slab_bytes
        self._arena = torch.zeros(size, dtype=torch.uint8, device=device)
        self.layers = tuple(_layers(config, plan, self._arena, dtype))

    def zero(self, fresh: Fresh) -> None:
        """Clear items that were handed out."""
        for tenant, items in ((Tenant.STATE, fresh.states), (Tenant.PAGE, fresh.pages)):
            if items:
                rows = _pool(self._arena, self.layout, tenant, 0, torch.uint8, self._item(tenant))
                rows[torch.tensor(items, device=rows.device)] = 0

    def restore(self, snapshots: Sequence[int], states: Sequence[int]) -> None:
        """Copy snapshots into states, which lack nothing then."""
        self._copy(snapshots, states, "snapshots", "states")
        for layer in self.layers if states else ():
            if isinstance(layer, LinearStorage) and layer.drafts is not None:
                layer.drafts.count[torch.tensor(states, device=self._arena.device)] = 0

    def snapshot(self, states: Sequence[int], snapshots: Sequence[int]) -> None:
        """Copy states into snapshots."""
        self._copy(states, snapshots, "states", "snapshots")

    def _copy(self, source: Sequence[int], target: Sequence[int], come: str, go: str) -> None:
        if not source:
            return
        first, last = (torch.tensor(ids, device=self._arena.device) for ids in (source, target))
        for layer in self.layers:
            if isinstance(layer, LinearStorage):
                getattr(layer, go)[last] = getattr(layer, come)[first]

    def _item(self, tenant: Tenant) -> tuple[int]:
        return (self.layout.stride_bytes(tenant),)


def _layers(config: ModelConfig, plan: MemoryPlan, arena: Tensor, dtype: torch.dtype):
    """Each layer's views; items lay their layers out one after another."""
    H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    state_at = page_at = linear = 0
    page_shape = (plan.page_tokens, G, D)
    page_bytes = plan.page_tokens * G * D * dtype.itemsize
    for kind in config.layer_types:
        if kind == "linear_attention":
            places = (Tenant.STATE, Tenant.SNAPSHOT)
            states, snapshots = (
                _pool(arena, plan.layout, place, state_at, torch.float32, (H, D, D))
                for place in places
            )
            drafts = _drafts(states, plan, arena, dtype, linear) if plan.ring_tokens else None
            yield LinearStorage(states, snapshots, drafts)
            state_at += H * D * D * torch.float32.itemsize
            linear += 1
        else:
            offsets = (page_at, page_at + page_bytes)
            yield KVStorage(
                *(
                    _pool(arena, plan.layout, Tenant.PAGE, offset, dtype, page_shape)
                    for offset in offsets
                )
            )
            page_at += 2 * page_bytes


def _drafts(
    states: Tensor, plan: MemoryPlan, arena: Tensor, dtype: torch.dtype, linear: int
) -> ReplayPool:
    """The rings of the linear layer of that number.

    Behind the states of all layers lie the keys and values of all, and then the counts of all.
    """
    H, D = states.shape[1:3]
    num_layers = plan.state_bytes // (H * D * D * torch.float32.itemsize)
    ring_bytes = H * plan.ring_tokens * D * dtype.itemsize
    rings_at = [plan.state_bytes + (2 * linear + n) * ring_bytes for n in range(2)]
    count_at = plan.state_bytes + 2 * num_layers * ring_bytes + linear * H * RING_COUNT_BYTES
    shape = (H, plan.ring_tokens, D)
    ring_k, ring_v = (_pool(arena, plan.layout, Tenant.STATE, at, dtype, shape) for at in rings_at)
    count = _pool(arena, plan.layout, Tenant.STATE, count_at, torch.int32, (H,))
    return ReplayPool(states, ring_k, ring_v, count)


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
