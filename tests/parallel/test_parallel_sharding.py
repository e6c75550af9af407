"""What fully_shard divides, and in which dtype it gathers: on a group that sends nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parallel_helpers import MODEL, MOE
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from sevenfold.config import parse_config
from sevenfold.models import HybridModel, ModelConfig
from sevenfold.models.feed_forward import Router
from sevenfold.models.layers import RMSNorm
from sevenfold.parallel import Layout, ParallelConfig
from sevenfold.parallel.building import divided_on_meta
from sevenfold.parallel.parts import parts_of, weights_dimension


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def divided(**degrees: Any) -> HybridModel:
    config = parse_config(ModelConfig, MODEL | {"moe": MOE}, "test")
    layout = Layout.join(ParallelConfig(**degrees), "cpu")
    model = divided_on_meta(config, layout, between=lambda model: None)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model.train()


def test_rows_are_divided_where_nothing_else_divides_them(group: None) -> None:
    placed = {name: p.placements for name, p in divided(shard=2).named_parameters()}  # pyright: ignore[reportAttributeAccessIssue]
    others = {name.split(".", 2)[-1] for name, (shard,) in placed.items() if shard.dim != 0}
    # One row; gate above up.
    assert others == {"mlp.coefficient.weight", "mlp.shared_mlp.gate_up_proj.weight"}


@pytest.mark.parametrize(
    ("name", "num_rows", "shards", "width", "dimension"),
    [
        ("layers.0.self_attn.qkv_proj.weight", 48, 4, 1, 0),
        ("layers.0.self_attn.qkv_proj.weight", 24, 4, 2, 1),  # tensor's
        ("layers.0.self_attn.qkv_proj.weight", 48, 5, 1, 1),  # 5 does not divide 48
        ("layers.0.self_attn.out_proj.weight", 16, 4, 2, 0),
        ("layers.0.mlp.gate_up_proj.weight", 48, 4, 1, 1),  # gate above up
        ("layers.0.mlp.experts.gate_up_proj", 8, 4, 2, 0),
        ("layers.0.mlp.experts.gate_up_proj", 2, 4, 1, 2),  # fewer experts than ranks
        ("layers.0.mlp.coefficient.weight", 1, 2, 1, 1),
        ("layers.0.self_attn.norm.weight", 16, 2, 2, 0),  # tensor's too
    ],
)
def test_dimension_zero_or_the_side_of_hidden_size(
    name: str, num_rows: int, shards: int, width: int, dimension: int
) -> None:
    assert weights_dimension(parts_of(name), num_rows, shards, width) == dimension


def test_experts_that_nobody_shares_are_no_part_of_what_is_gathered(group: None) -> None:
    own = divided(shard=2, expert=2, gather_dtype="bf16")
    assert not any(isinstance(layer.mlp.experts, FSDPModule) for layer in own.layers)
    shared = divided(shard=2, gather_dtype="bf16")
    assert all(isinstance(layer.mlp.experts, FSDPModule) for layer in shared.layers)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # the last norm's result on a CPU
@pytest.mark.parametrize("gather_dtype", [None, "bf16"])
def test_products_take_weights_that_were_gathered_in_bf16(
    group: None, gather_dtype: str | None
) -> None:
    model = divided(shard=2, gather_dtype=gather_dtype)
    dtypes: dict[str, set[torch.dtype]] = {}

    def look(module: nn.Module, _args: Any) -> None:
        kind = "whole" if isinstance(module, RMSNorm | Router) else "products"
        dtypes.setdefault(kind, set()).update(p.dtype for p in module.parameters())

    for layer in model.layers:
        for module in layer.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(look)
    ids = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.cross_entropy(model.hidden(ids).hidden, ids)
    loss.backward()
    products = torch.float32 if gather_dtype is None else torch.bfloat16
    assert dtypes == {"whole": {torch.float32}, "products": {products}}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.dtype, parameter.grad.dtype) == (torch.float32, torch.float32), name
