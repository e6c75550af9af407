"""States go to snapshots and back whole, beside rings of drafts too, and nothing else changes."""

import pytest
import torch
from engine_helpers import tiny_model
from torch import Tensor

from sevenfold.engine.memory import plan_memory
from sevenfold.engine.speculation import RING_TOKENS
from sevenfold.engine.storage import LinearStorage, Storage

STATE, SNAPSHOT, SHOWN = 1, -2, 4  # an item of each, and how many are looked at


def storage_of(ring_tokens: int) -> Storage:
    model = tiny_model("lslfl")
    size = {"budget_bytes": 4 << 20, "context_tokens": 64, "page_tokens": 16}
    plan = plan_memory(model.config, kv_element_bytes=4, ring_tokens=ring_tokens, **size)
    return Storage(model.config, plan, device=model.device, dtype=model.dtype)


def parts_of(layer: LinearStorage) -> dict[str, Tensor]:
    """First states and last snapshots, which have slabs of their own, and the states' rings."""
    assert layer.snapshots.exact is not None
    parts = {"states": layer.states[:SHOWN], "snapshots": layer.snapshots.exact[-SHOWN:]}
    if layer.drafts is not None:
        rings = {"k": layer.drafts.ring_k, "v": layer.drafts.ring_v, "count": layer.drafts.count}
        parts |= {name: ring[:SHOWN] for name, ring in rings.items()}
    return parts


@pytest.mark.parametrize("ring_tokens", [0, RING_TOKENS])
def test_a_state_goes_into_a_snapshot_and_back(ring_tokens: int) -> None:
    storage, generator = storage_of(ring_tokens), torch.Generator().manual_seed(0)
    layers = [parts_of(x) for x in storage.layers if isinstance(x, LinearStorage)]
    for parts in layers:
        for tensor in parts.values():
            tensor.copy_(torch.randint(1, 99, tensor.shape, generator=generator))
    wanted = [{name: tensor.clone() for name, tensor in parts.items()} for parts in layers]
    first = storage.layers[0]
    assert isinstance(first, LinearStorage)
    assert first.snapshots.exact is not None
    snapshot = len(first.snapshots.exact) + SNAPSHOT
    storage.snapshot([STATE], [snapshot])
    for parts in layers:
        parts["states"][STATE] = 0
    storage.restore([snapshot], [STATE])
    for parts, expected in zip(layers, wanted, strict=True):
        expected["snapshots"][SNAPSHOT] = expected["states"][STATE]
        if ring_tokens:
            expected["count"][STATE] = 0  # a restored state lacks nothing
        assert set(parts) == set(expected)
        for name, tensor in parts.items():
            assert torch.equal(tensor, expected[name]), name
