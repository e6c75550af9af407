"""What runs beside an exchange, there and back; and what one rank's exchange with itself gives."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from sevenfold.parallel.collectives import Flight, begin_exchange, end_exchange, exchange_rows
from sevenfold.parallel.exchange import Collective


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of one rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def flights_told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of flights, numbered as they first start."""
    events: list[str] = []
    known: list[Flight] = []
    for name in ("start", "finish"):
        method = getattr(Flight, name)

        def told(self, *rest, name=name, method=method):
            if self not in known:
                known.append(self)
            events.append(f"{name} {known.index(self)}")
            return method(self, *rest)

        monkeypatch.setattr(Flight, name, told)
    return events


class _Told(torch.autograd.Function):
    """The square, which says when it runs."""

    @staticmethod
    def forward(ctx, x: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        ctx.save_for_backward(x)
        events.append("work")
        return x.square()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("work")
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0], None


def test_work_between_the_two_runs_beside_the_exchange_both_ways(
    alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = flights_told(monkeypatch)
    x, rows = torch.arange(3.0, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    flight = Flight([2], [2], Collective(alone))
    underway = begin_exchange(3 * rows, flight)
    y = _Told.apply(x, events)
    total = (end_exchange(underway, flight).sum(0) * y).sum()
    assert events == ["start 0", "work", "finish 0"]
    events.clear()
    total.backward()
    # The gradient leaves first, the work follows, and only then is it waited for.
    assert events == ["start 0", "work", "finish 0"]
    assert rows.grad.tolist() == [[0.0, 3.0, 12.0]] * 2
    assert x.grad.tolist() == [0.0, 12.0, 24.0]


def test_an_exchange_of_nothing_has_a_gradient(alone: dist.ProcessGroup) -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    arrived = exchange_rows(rows[:0], [0], [0], alone)
    assert arrived.shape == (0, 3)
    arrived.sum().backward()
    assert rows.grad.tolist() == [[0.0] * 3] * 2
