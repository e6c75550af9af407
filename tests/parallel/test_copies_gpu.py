"""Exchange by copies between two GPUs, beside NCCL's: the same rows and gradients."""

import tempfile

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from sevenfold.parallel.collectives import Flight, begin_exchange, end_exchange
from sevenfold.parallel.copies import Copies, Slots
from sevenfold.parallel.exchange import Collective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
WIDTH = 2048
# Rows from each rank to the other: of several parts, more than fill a ring; of a part; none.
SLOTS = Slots.of(2)
MANY = (SLOTS.count + 2) * SLOTS.size // (2 * WIDTH) + 5
FLIGHTS = [(3, 0), (0, 0), (MANY, 7), (0, MANY), (MANY, MANY), (1000, 1001)]


def exchange_beside_nccl(rank: int, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    copies, collective = Copies(group), Collective(group)
    for repeat in range(3):
        for number, from_rank in enumerate(FLIGHTS):
            sent, received = [0, 0], [0, 0]
            sent[1 - rank], received[1 - rank] = from_rank[rank], from_rank[1 - rank]
            torch.manual_seed(1000 * repeat + 10 * number + rank)
            rows = torch.randn(from_rank[rank], WIDTH, device="cuda", dtype=torch.bfloat16)
            weight = torch.randn(from_rank[1 - rank], WIDTH, device="cuda", dtype=torch.bfloat16)
            found = []
            for exchange in (copies, collective):
                leaf = rows.clone().requires_grad_()
                flight = Flight(sent, received, exchange)
                underway = begin_exchange(2 * leaf, flight)
                # Memory that nobody holds is somebody else's from here on.
                others = [torch.full_like(rows, float("nan")) for _ in range(3)]
                arrived = end_exchange(underway, flight)
                del others
                (weight * arrived).sum().backward()
                found.append((arrived.detach(), leaf.grad))
            for ours, theirs in zip(*found, strict=True):
                assert torch.equal(ours, theirs), (repeat, number)
    torch.cuda.synchronize()
    dist.destroy_process_group()


def test_rows_and_gradients_are_those_of_a_collective() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        multiprocessing.spawn(exchange_beside_nccl, (store,), nprocs=2)
