"""Which part of a parameter a rank holds; capacity over ranks; what a layout costs."""

import pytest
import torch
from parallel_helpers import MODEL, MOE, hidden_dim, tensor_dim

from sevenfold.config import parse_config
from sevenfold.models import HybridModel, ModelConfig, preset
from sevenfold.models.accounting import count_parameters
from sevenfold.ops import plan_dispatch
from sevenfold.parallel import ParallelConfig
from sevenfold.parallel.estimate import Rates, Work, rank_memory, step_time
from sevenfold.parallel.experts import limited, share_capacity
from sevenfold.parallel.parts import parts_of, tensor_slice

WORK = Work(
    seq_len=8192, step_rows=512, micro_batch_rows=256, element_bytes=2, recomputed_layers=80
)


def test_every_parameter_is_divided_where_its_shape_says() -> None:
    with torch.device("meta"):
        model = HybridModel(parse_config(ModelConfig, MODEL | {"moe": MOE}, "test"))
    for name, parameter in model.named_parameters():
        parts = parts_of(name)
        assert parts.tensor == tensor_dim(name), name
        assert parts.weights == hidden_dim(name, parameter), name
        assert parts.is_expert == (".experts." in name), name
        assert parameter.shape[parts.weights] == 16, name  # hidden_size, or the norm of all heads


def test_tensor_ranks_divide_gate_and_up_apart() -> None:
    weight = torch.arange(8.0)[:, None].expand(8, 2)
    parts = parts_of("layers.0.mlp.gate_up_proj.weight")
    own = [tensor_slice(weight, parts, rank, 2)[:, 0].tolist() for rank in range(2)]
    assert own == [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]


def test_capacity_goes_to_the_ranks_in_their_order() -> None:
    counts = torch.tensor([[3, 0, 5], [4, 2, 0], [1, 2, 3]])
    quotas = share_capacity(counts, 4)
    assert quotas.tolist() == [[3, 0, 4], [1, 2, 0], [0, 2, 0]]


def test_limits_keep_the_first_tokens_as_one_process_would() -> None:
    experts = torch.tensor([[0, 1], [1, 2], [1, 0], [0, 2], [2, 1]])
    whole = plan_dispatch(experts, 3, None)
    kept = limited(whole, torch.tensor([3, 4, 3]), torch.tensor([2, 2, 2]))
    exact = plan_dispatch(experts, 3, 2)
    assert torch.equal(kept.choice, exact.choice)
    assert torch.equal(kept.row, exact.row)
    assert torch.equal(kept.rows_per_expert, exact.rows_per_expert)


@pytest.mark.parametrize("degrees", [{}, {"shard": 64}, {"tensor": 8, "shard": 16, "expert": 16}])
def test_divided_weights_make_the_whole_model(degrees: dict[str, int]) -> None:
    model, parallel = preset("minimax-text-01"), ParallelConfig(**degrees)
    memory = rank_memory(model, parallel, WORK)
    total = count_parameters(model).total
    # Norms and routers are on every tensor rank; all else is divided by all.
    copied = total if parallel.num_ranks == 1 else memory.weights // 4 * parallel.num_ranks
    small = 80 * (2 * 6144 + 32 * 6144) + 6144
    assert total <= copied <= total + parallel.tensor * small
    assert memory.moments == 2 * memory.weights == 2 * memory.gradients
    assert memory.total > 4 * memory.weights


def test_a_step_is_no_faster_than_its_products_nor_than_its_exchange() -> None:
    model, rates = preset("minimax-text-01"), Rates()
    parallel = ParallelConfig(shard=64, tensor=4, expert=32)
    time = step_time(model, parallel, WORK, rates)
    assert set(time.exchange_s) == {"weights", "tensor", "expert"}
    assert max(time.compute_s, *time.exchange_s.values()) <= time.overlapped_s < time.serial_s
    twice = step_time(
        model, ParallelConfig(replicate=2, shard=64, tensor=4, expert=32), WORK, rates
    )
    assert twice.compute_s == time.compute_s / 2
    assert twice.exchange_s["copies"] > 0
