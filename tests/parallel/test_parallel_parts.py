"""Which part of a parameter a rank holds; capacity over ranks; what a layout costs."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from parallel_helpers import MODEL, MOE, hidden_dim, tensor_dim

from sevenfold.config import parse_config
from sevenfold.models import HybridModel, ModelConfig, preset
from sevenfold.models.accounting import count_parameters
from sevenfold.models.training_memory import training_memory
from sevenfold.ops import plan_dispatch
from sevenfold.optim import GroupConfig, OptimizerConfig
from sevenfold.parallel import ParallelConfig
from sevenfold.parallel.capacity import limited, order_of_pieces, share_capacity
from sevenfold.parallel.copies import Copies
from sevenfold.parallel.estimate import Rates, Work, rank_memory, step_time
from sevenfold.parallel.holding import optimizer_share
from sevenfold.parallel.layout import place_of
from sevenfold.parallel.parts import parts_of, tensor_slice
from sevenfold.parallel.rehearsal import heaviest_rank, rehearse

ADAMW = OptimizerConfig(lr=0.1)
WORK = Work(seq_len=8192, step_rows=512, micro_batch_rows=256, element_bytes=2, recompute_every=1)


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


def test_capacity_goes_to_the_pieces_in_their_order() -> None:
    counts = np.array([[3, 0, 5], [4, 2, 0], [1, 2, 3]])
    quotas = share_capacity(counts, 4)
    assert quotas.tolist() == [[3, 0, 4], [1, 2, 0], [0, 2, 0]]


def test_limits_keep_the_first_tokens_as_one_process_would() -> None:
    experts = torch.tensor([[0, 1], [1, 2], [1, 0], [0, 2], [2, 1]])
    whole = plan_dispatch(experts, 3, None)
    kept = limited(whole, np.array([[3, 4, 3]]), np.array([[2, 2, 2]]))
    exact = plan_dispatch(experts, 3, 2)
    assert torch.equal(kept.choice, exact.choice)
    assert torch.equal(kept.row, exact.row)
    assert torch.equal(kept.rows_per_expert, exact.rows_per_expert)


def test_limits_count_within_each_piece() -> None:
    experts = torch.tensor([[0], [0], [0], [0], [1]])  # pieces of three tokens and of two
    counts, quota = np.array([[3, 0], [1, 1]]), np.array([[1, 0], [1, 0]])
    kept = limited(plan_dispatch(experts, 2, None), counts, quota)
    assert kept.choice.tolist() == [0, 3]
    assert kept.row.flatten().tolist() == [0, 2, 2, 1, 2]
    assert kept.rows_per_expert.tolist() == [2, 0]


def test_pieces_sort_by_their_tokens_over_ranks_that_hold_two_stretches() -> None:
    # Two context ranks hold stretches 0, 3 and 1, 2 of a row.
    config = ParallelConfig(context=2, shard=2, expert=4)
    assert order_of_pieces(config, place_of(config, 3), 1) == [0, 2, 3, 1, 4, 6, 7, 5]
    # Tensor ranks have neighbouring parts of a stretch, each in two token groups.
    config = ParallelConfig(tensor=2, shard=2, expert=2, expert_tensor=1)
    assert order_of_pieces(config, place_of(config, 0), 2) == [0, 1, 2, 3]
    assert order_of_pieces(config, place_of(config, 3), 2) == [0, 1, 2, 3]


LAYOUTS = [
    {},
    {"shard": 64},
    {"tensor": 8, "shard": 16, "expert": 16},
    {"tensor": 4, "shard": 8, "expert": 32, "expert_tensor": 1},
    {"pipeline": 8, "pipeline_stages": 2, "shard": 2, "context": 2},
]


def test_copies_take_rings_and_others_summands() -> None:
    model, degrees = preset("bench-2b"), {"shard": 8, "expert": 2}
    plain = rank_memory(model, ParallelConfig(**degrees), WORK, ADAMW)
    tokens = rank_memory(model, ParallelConfig(**degrees, expert_exchange="copies"), WORK, ADAMW)
    weights = rank_memory(model, ParallelConfig(**degrees, weight_exchange="copies"), WORK, ADAMW)
    assert tokens.total - plain.total == Copies.memory_bytes(2)
    # Dense layers are divided among 8 ranks, an expert's weights among 4.
    rings = Copies.memory_bytes(8) + Copies.memory_bytes(4)
    assert weights.kept - plain.kept == rings
    assert weights.total - plain.total > rings


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_the_count_is_what_a_rank_builds(degrees: dict[str, int]) -> None:
    whole, parallel = preset("minimax-text-01"), ParallelConfig(**degrees)
    # Two of its ten rounds of layers, of which each stage has one.
    model = whole.model_copy(update={"layer_types": whole.layer_types[:16]})
    memory = rank_memory(model, parallel, WORK, ADAMW)
    held = heaviest_rank(model, parallel)
    assert memory.moments == 2 * memory.weights
    assert memory.total > 3 * memory.weights + memory.kept + memory.working
    if parallel.pipeline == 1:
        assert memory.weights == 4 * held.total
    else:
        assert 0.9 * 4 * held.total <= memory.weights <= 4 * held.total  # of the fullest in all


def test_muon_has_one_moment_of_what_it_moves_on_every_pipeline_rank() -> None:
    names = ("layers.*.mlp.*", "layers.3.self_attn.*")
    muon = OptimizerConfig(lr=0.1, kind="muon")
    fewer = OptimizerConfig(lr=0.1, kind="muon", groups=(GroupConfig(names=names, kind="adamw"),))
    model = preset("bench-2b").model_copy(update={"tie_word_embeddings": False})
    with torch.device("meta"):
        named = dict(HybridModel(model).named_parameters())
    ours = {
        name: parameter.numel()
        for name, parameter in named.items()
        if parameter.dim() >= 2 and name not in ("embed_tokens.weight", "lm_head.weight")
    }
    taken = [n for name, n in ours.items() if ".mlp." in name or "layers.3.self_attn." in name]
    total, parallel = count_parameters(model).total, ParallelConfig(pipeline=4)
    for optimizer, matrices in ((ADAMW, 0), (muon, sum(ours.values()))):
        shares = [optimizer_share(model, parallel, optimizer, rank) for rank in range(4)]
        assert sum(share.moments for share in shares) == 2 * total - matrices
        assert [share.update_bytes > 0 for share in shares] == [matrices > 0] * 4
    alone, some = (optimizer_share(model, ParallelConfig(), o, 0) for o in (muon, fewer))
    assert some.moments - alone.moments == sum(taken)
    assert some.update_bytes < alone.update_bytes


@pytest.mark.parametrize(
    "degrees",
    [
        {"pipeline": 2, "tensor": 2, "shard": 2, "expert": 2},
        {"replicate": 2, "context": 2, "tensor": 2, "expert": 4, "expert_tensor": 1},
    ],
    ids=str,
)
def test_the_ranks_parts_make_the_whole_model(degrees: dict[str, int]) -> None:
    config, parallel = (
        parse_config(ModelConfig, MODEL | {"moe": MOE}, "test"),
        ParallelConfig(**degrees),
    )
    held = [rehearse(config, parallel, rank).by_name for rank in range(parallel.num_ranks)]
    with torch.device("meta"):
        model = HybridModel(config)
    for name, parameter in model.named_parameters():
        copies = parallel.replicate * (parallel.tensor if tensor_dim(name) is None else 1)
        elements = sum(rank.get(name, 0) for rank in held)
        assert elements == copies * parameter.numel(), name


def test_rounded_weights_take_half_the_bytes_but_outside_of_the_blocks() -> None:
    model = preset("bench-2b")
    config = ParallelConfig(shard=2, gather_once=True)
    narrow = config.model_copy(update={"gather_dtype": "bf16"})
    work = replace(WORK, recompute_every=None)
    whole, rounded = (rank_memory(model, c, work, ADAMW) for c in (config, narrow))
    outer = 2 * model.vocab_size * model.hidden_size + model.hidden_size
    assert whole.gathered - rounded.gathered == 2 * (count_parameters(model).total - outer)
    assert whole.cast_weights > rounded.cast_weights == 0
    wide, sent = (
        step_time(model, c, work, Rates()).exchange_s["weights"] for c in (config, narrow)
    )
    assert 0.75 * wide < sent < 0.8 * wide  # gradients are fp32


def test_a_rehearsal_is_for_a_process_of_no_group() -> None:
    with (
        patch("torch.distributed.is_initialized", return_value=True),
        pytest.raises(RuntimeError, match="outside of a process group"),
    ):
        rehearse(preset("minimax-text-01"), ParallelConfig(shard=2), 0)


def test_more_stages_wait_less_and_keep_more_micro_batches() -> None:
    model, rates = preset("minimax-text-01"), Rates()
    work = Work(8192, step_rows=512, micro_batch_rows=64, element_bytes=2, recompute_every=1)
    plain, once, twice = (
        step_time(model, ParallelConfig(pipeline=p, pipeline_stages=v, shard=64 // p), work, rates)
        for p, v in ((1, 1), (8, 1), (8, 2))
    )
    assert plain.compute_s < twice.compute_s < once.compute_s
    # 7 of 8 micro-batches' time is spent waiting.
    assert 1.87 < once.compute_s / plain.compute_s < 1.88
    assert "pipeline" in once.exchange_s
    assert "pipeline" not in plain.exchange_s
    assert twice.exchange_s["pipeline"] == 2 * once.exchange_s["pipeline"]


def test_a_pipelines_first_rank_keeps_what_micro_batches_wait_for() -> None:
    model = preset("bench-2b").model_copy(update={"tie_word_embeddings": False})
    work = Work(2048, step_rows=8, micro_batch_rows=2, element_bytes=2)
    alone = rank_memory(model, ParallelConfig(), work, ADAMW)
    staged = rank_memory(model, ParallelConfig(pipeline=2), work, ADAMW)
    # Half the layers, whose tensors two micro-batches keep; one of them at its highest point.
    assert 0.9 * alone.kept < staged.kept < 1.1 * alone.kept
    assert 0.4 * alone.weights < staged.weights < 0.6 * alone.weights


def test_rank_memory_knows_stream_products_heads_and_widths() -> None:
    model = preset("1b-hybrid")
    work = Work(8192, step_rows=2, micro_batch_rows=2, element_bytes=2, stream_bytes=2)
    narrow = rank_memory(model, ParallelConfig(), work, ADAMW)
    assert narrow == training_memory(model, 2 * 8192)
    wide = rank_memory(model, ParallelConfig(), replace(work, stream_bytes=4), ADAMW)
    assert wide == training_memory(model, 2 * 8192, stream_bytes=4)
    full = rank_memory(
        model, ParallelConfig(), replace(work, stream_bytes=4, element_bytes=4), ADAMW
    )
    assert full.cast_weights == 0
    assert 1.9 * narrow.kept < full.kept <= 2 * narrow.kept
    divided = rank_memory(model, ParallelConfig(tensor=2), work, ADAMW)
    stream = 4 * 1536 * 2  # of a token in a block, input and norms: all tensor ranks have it whole
    inside = narrow.kept - 2 * 8192 * 32 * stream
    assert abs(narrow.kept - divided.kept - inside / 2) < 0.02 * narrow.kept


def test_later_micro_batches_find_all_gradients() -> None:
    model = preset("1b-hybrid")
    whole = Work(65_536, step_rows=2, micro_batch_rows=2, element_bytes=2, recompute_every=1)
    parts = replace(whole, step_rows=4)
    assert (
        rank_memory(model, ParallelConfig(), whole, ADAMW).gradients
        < 4 * count_parameters(model).total
    )
    assert rank_memory(model, ParallelConfig(), parts, ADAMW).gradients == 4 * (
        count_parameters(model).total
    )
    divided = rank_memory(model, ParallelConfig(shard=2), parts, ADAMW)
    assert divided.gradients == divided.weights + 4 * model.vocab_size * model.hidden_size


def test_experts_exchange_over_nodes_and_their_widths_within_one() -> None:
    """MiniMax-Text-01 on 2,048 ranks by hand: 4 tensor ranks, 32 of experts, 4 neighbours each.

    A rank has 8,192 * 512 / 512 tokens a micro-batch, of which it sends a fourth to two experts
    each, four micro-batches a step, 80 layers forward twice and backward once.
    """
    model, rates = preset("minimax-text-01"), Rates()
    parallel = ParallelConfig(replicate=8, shard=64, tensor=4, expert=32)
    work = Work(8192, step_rows=2048, micro_batch_rows=512, element_bytes=2, recompute_every=1)
    time = step_time(model, parallel, work, rates)
    rows = 8192 / 4 * 2 * 6144 * 2  # bytes of the rows that a rank sends once
    times = 2 * 4 * 80 * 3  # there and back
    assert time.exchange_s["expert"] == pytest.approx(times * rows * 31 / 32 / 40e9)
    assert time.exchange_s["expert_tensor"] == pytest.approx(times * rows * 3 / 300e9)
    assert time.exchange_s["expert"] + time.exchange_s["expert_tensor"] < 4
    # The mixer's sum is two gathers; the third joins what the experts gave.
    tokens = 4 * 8192 * 6144 * 2
    assert time.exchange_s["tensor"] == pytest.approx(80 * 3 * 3 * tokens * 3 / 4 / 300e9)


def test_a_step_is_no_faster_than_its_products_nor_than_its_exchange() -> None:
    model, rates = preset("minimax-text-01"), Rates()
    parallel = ParallelConfig(shard=64, tensor=4, expert=32)
    time = step_time(model, parallel, WORK, rates)
    assert set(time.exchange_s) == {"weights", "tensor", "expert", "expert_tensor"}
    assert max(time.compute_s, *time.exchange_s.values()) <= time.overlapped_s < time.serial_s
    twice = step_time(
        model, ParallelConfig(replicate=2, shard=64, tensor=4, expert=32), WORK, rates
    )
    assert twice.compute_s == time.compute_s / 2
    assert twice.exchange_s["copies"] > 0
