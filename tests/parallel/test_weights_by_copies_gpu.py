"""Weights gathered and gradients summed by copies between two GPUs: bit for bit as by NCCL."""

import tempfile

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from sevenfold.parallel.copies import Copies, Slots
from sevenfold.parallel.weights_by_copies import exchange_by_copies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
# A rank's half of a layer is of more parts than a ring has slots.
WIDTH = 16_384
assert Slots.of(2).count * Slots.of(2).size < WIDTH * WIDTH * 4 // 2


def trained(mesh: DeviceMesh, copies: Copies | None, *, again: bool) -> list[torch.Tensor]:
    """Weights after some steps. A sum of two is the same in any order."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False, device="cuda") for _ in range(3)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 8, bias=False, device="cuda"))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=again)
    fully_shard(model, mesh=mesh)
    for unit in (u for u in model.modules() if isinstance(u, FSDPModule)):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if copies is not None:
            exchange_by_copies(unit, copies)
    for step in range(3):
        torch.manual_seed(10 * step + mesh.get_local_rank())
        model(torch.randn(64, WIDTH, device="cuda")).square().sum().backward()
        for parameter in model.parameters():
            parameter.data.to_local().sub_(parameter.grad.to_local(), alpha=1e-5)
            parameter.grad = None
    return [parameter.data.to_local() for parameter in model.parameters()]


def train_beside_nccl(rank: int, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("weights",))
    copies = Copies(mesh.get_group("weights"))
    for again in (True, False):
        found = [trained(mesh, how, again=again) for how in (copies, None)]
        for ours, theirs in zip(*found, strict=True):
            assert ours.isfinite().all()
            assert torch.equal(ours, theirs), again
    torch.cuda.synchronize()
    dist.destroy_process_group()


def test_weights_are_those_of_collectives() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        multiprocessing.spawn(train_beside_nccl, (store,), nprocs=2)
