"""Routers' statistics of all layers at once: their number of operations, and ranks' shares."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sevenfold.models.router_stats import RouterCounts, router_stats
from sevenfold.ops import route_and_count
from sevenfold.ops.testing import check_error

# Sums in another order, some terms of which cancel.
ROUNDING = 1e3 * torch.finfo(torch.float64).eps


class Calls(TorchDispatchMode):
    """Counts operators of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def logits_of(layer: int, T: int = 12, E: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(layer)
    return (3 * torch.randn(T, E, generator=generator)).to(dtype)


def counts_of(logits: Tensor, capacity: int | None = None) -> RouterCounts:
    _, experts, totals = route_and_count(logits, 2)
    kept = torch.bincount(experts.flatten(), minlength=logits.shape[1])
    kept = kept if capacity is None else kept.clamp(max=capacity)
    return RouterCounts(totals, kept, experts.numel())


def test_many_layers_take_as_many_operations_as_one() -> None:
    found = []
    for num_layers in (1, 7):
        counts = [counts_of(logits_of(layer)) for layer in range(num_layers)]
        with Calls() as calls:
            rows = router_stats(counts, 2).rows
        assert rows.shape == (num_layers, 3 + 4)
        found.append(calls.number)
    assert found[0] == found[1]


@pytest.mark.parametrize("capacity", [None, 2])
def test_each_layer_by_definition(capacity: int | None) -> None:
    layers = [logits_of(layer) for layer in range(3)]
    stats = router_stats([counts_of(x, capacity) for x in layers], 2)
    low = router_stats([counts_of(x.float(), capacity) for x in layers], 2)
    for n, logits in enumerate(layers):
        chosen = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1.0)
        load = chosen.mean(0)
        balance = 4 * (load * logits.softmax(-1).mean(0)).sum()
        lost = 0.0 if capacity is None else (chosen.sum(0) - capacity).clamp(min=0).sum() / 24
        exact = torch.stack([balance, logits.logsumexp(-1).square().mean(), torch.as_tensor(lost)])
        honest = exact.float()
        check_error("scalars", low.rows[n, :3], honest, exact)
        check_error("load", low.load[n], load.float(), load)
        assert torch.allclose(stats.rows[n, :3], exact)


@pytest.mark.parametrize("num_first", [6, 5, 12])
def test_shares_of_ranks_sum_to_the_whole_with_one_collective(num_first: int) -> None:
    """Values and gradients; ranks hold different numbers of the tokens, or none."""
    layers = [logits_of(layer).requires_grad_() for layer in range(3)]
    whole = router_stats([counts_of(x) for x in layers], 2)
    parts = (slice(num_first), slice(num_first, 12))
    halves = [[counts_of(x[part]) for x in layers] for part in parts]
    chosen = torch.stack([one.totals[0, 4:-1].detach() for one in map(counts_of, layers)])
    asked: list[Tensor] = []

    def summed(own: Tensor) -> Tensor:
        asked.append(own)
        return chosen

    shares = [router_stats(own, 2, sum_over_ranks=summed) for own in halves]
    assert torch.equal(asked[0] + asked[1], chosen)
    assert len(asked) == 2  # one of each rank, for three layers
    assert not any(own.requires_grad for own in asked)
    total = shares[0].rows + shares[1].rows
    assert torch.allclose(total, whole.rows, rtol=ROUNDING, atol=0)
    weights = torch.rand(3, 2, dtype=torch.float64)
    found, exact = (
        torch.autograd.grad((rows[:, :2] * weights).sum(), layers) for rows in (total, whole.rows)
    )
    for one, other in zip(found, exact, strict=True):
        assert torch.allclose(one, other, rtol=ROUNDING, atol=0)
