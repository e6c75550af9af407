"""One rank of MiniMax-Text-01 on eight GPUs of 80 GB, built as the engine would, on meta."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from sevenfold.engine import sizing
from sevenfold.engine.device import chunk_token_bytes, gathered_bytes
from sevenfold.engine.memory import MemoryPlan, plan_memory
from sevenfold.engine.quantised_weights import exchange_weights
from sevenfold.engine.storage import Storage
from sevenfold.models import HybridModel, preset
from sevenfold.models.accounting import WeightFormat, kv_bytes, state_bytes
from sevenfold.models.checkpoint.parts import stored_dtype
from sevenfold.models.deployment import plan_deployment
from sevenfold.models.stepping import _halves
from sevenfold.parallel import Layout, ParallelConfig, divide_model
from sevenfold.parallel.divided_loading import DividedModel, narrow_model

TEXT_01 = preset("minimax-text-01")
META = torch.device("meta")
NODE = {"num_devices": 8, "device_bytes": 80 * 10**9}
MILLION = 2**20


@contextmanager
def fake_group(rank: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_of(weights: WeightFormat | None, rank: int = 0) -> HybridModel:
    """A rank's part as load_divided_model makes it, in bf16, before it is given memory."""
    with META:
        model = HybridModel(TEXT_01)
    parallel = ParallelConfig(tensor=8)
    exchange = None if weights is None else partial(exchange_weights, weights=weights)
    narrow_model(model, parallel, rank, exchange)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored_dtype(name, torch.bfloat16))
    with fake_group(rank):
        return DividedModel(model).connect(Layout.join(parallel, "cpu"))


def bytes_of(model: HybridModel) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def engine_plan(model: HybridModel, free_bytes: int) -> tuple[MemoryPlan, int]:
    """What size_engine makes of so much free memory of a GPU, and what recorded runs take."""
    recorded = sizing._recorded_bytes(model, 0)
    plan = plan_memory(
        model.config,
        budget_bytes=int(sizing._FREE_SHARE["cuda"] * free_bytes) - recorded,
        context_tokens=MILLION,
        page_tokens=sizing.PAGE_TOKENS,
        kv_element_bytes=model.dtype.itemsize,
    )
    return plan, recorded


@pytest.mark.parametrize(
    ("weights", "expected"), [("int8", 57_471_051_776), ("int8-experts", 59_811_454_976)]
)
def test_a_rank_holds_a_million_tokens_on_80_gb(weights: WeightFormat, expected: int) -> None:
    model = rank_of(weights)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (8, 1)
    held = bytes_of(model)
    assert held == expected
    plan, recorded = engine_plan(model, 80 * 10**9 - held)
    assert plan.request_bytes(MILLION) <= plan.budget_bytes
    # One request's state and keys, to the rounding of a slab's places.
    own = (state_bytes(TEXT_01) + kv_bytes(TEXT_01, MILLION)) // 8
    assert own <= plan.request_bytes(MILLION) <= 1.01 * own
    storage = Storage(model.config, plan, device=META, dtype=torch.bfloat16)
    assert len(storage.layers) == 80
    slabs = plan.layout.num_slabs * plan.layout.slab_bytes
    assert slabs <= plan.budget_bytes
    # What is left holds a step's activations.
    step = 8192 * chunk_token_bytes(model.config, element_bytes=2)
    step += gathered_bytes(model.config, element_bytes=2)
    assert held + slabs + recorded + step <= 80 * 10**9


@pytest.mark.parametrize("weights", [None, "int8", "int8-experts", "fp8"])
def test_the_plan_counts_what_a_rank_holds(weights: WeightFormat | None) -> None:
    """Never less, and above it only the seven eighths of scales and norms that ranks divide."""
    held = bytes_of(rank_of(weights))
    assert held <= plan_deployment(TEXT_01, **NODE, weights=weights).weight_bytes <= 1.005 * held


def test_the_last_rank_holds_as_much_as_the_first() -> None:
    assert bytes_of(rank_of("int8", rank=7)) == bytes_of(rank_of("int8"))


def test_bf16_does_not_fit() -> None:
    assert bytes_of(rank_of(None)) > 80 * 10**9


def test_a_rank_decodes_by_the_kernels_of_a_few_rows() -> None:
    """Both halves of every layer in bf16; with 8-bit weights its modules."""
    row = torch.empty(1, 1, TEXT_01.hidden_size, dtype=torch.bfloat16, device=META)
    for weights, serves in ((None, True), ("int8", False)):
        halves = [_halves(block, row) for block in rank_of(weights).layers]
        assert all((half.mix is not None) == serves for half in halves)
        assert all((half.feed is not None) == serves for half in halves)


def test_tokens_that_travel_to_experts_are_summed_there() -> None:
    with META:
        model = HybridModel(TEXT_01)
    parallel = ParallelConfig(tensor=8, expert=8, expert_tensor=1)
    with fake_group(0):
        divide_model(model, Layout.join(parallel, "cpu"))
    assert all(block.ranks is None for block in model.layers)
