"""Degrees that do not suit a model, a batch or the number of processes are refused by name."""

import pytest
from parallel_helpers import MODEL, MOE

from sevenfold.config import ConfigError, parse_config
from sevenfold.models import ModelConfig
from sevenfold.parallel import Layout, ParallelConfig, Place, check_num_ranks
from sevenfold.parallel.layout import place_of
from sevenfold.parallel.pipeline import rank_stages
from sevenfold.train import RunConfig


def run_config(**sections: dict) -> RunConfig:
    table = {
        "run": {"out": "out", "steps": 2},
        "data": {"path": "data", "seq_len": 16},
        "model": MODEL,
        "optimizer": {"lr": 0.1},
        "batch": {"tokens_per_step": 128},
    }
    return parse_config(RunConfig, table | sections, "run.toml")


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        ({"shard": 3}, {}, r"shard \* context must divide hidden_size = 16, got 3"),
        ({"tensor": 8}, {"vocab_size": 60}, "tensor must divide vocab_size = 60, got 8"),
        ({"tensor": 4}, {"num_key_value_heads": 2}, "divide num_key_value_heads = 2, got 4"),
        ({"tensor": 4}, {"intermediate_size": 6}, "divide intermediate_size = 6, got 4"),
        ({"tensor": 4}, {"moe": MOE | {"shared_intermediate_size": 6}}, "shared_intermediate_size"),
        ({"shard": 2, "expert": 2}, {}, "expert must be 1 for a model without experts, got 2"),
        ({"shard": 8, "expert": 8}, {"moe": MOE}, "divide num_local_experts = 4, got 8"),
        (
            {"shard": 2, "expert": 4},
            {"moe": MOE},
            r"expert \* expert_tensor must divide shard \* context \* tensor = 2, got 4",
        ),
        (
            {"shard": 4, "tensor": 2, "expert": 4, "expert_tensor": 4},
            {"moe": MOE},
            r"expert \* expert_tensor must divide shard \* context \* tensor = 8, got 16",
        ),
        (
            {"shard": 16, "expert_tensor": 16},
            {"moe": MOE},
            "expert_tensor must divide intermediate_size = 8, got 16",
        ),
        (
            {"replicate": 2, "weight_exchange": "copies"},
            {},
            'weight_exchange must be "collective" where no ranks divide weights, got "copies"',
        ),
        (
            {"shard": 2, "expert_exchange": "copies"},
            {"moe": MOE},
            'expert_exchange must be "collective" where no ranks divide the experts, got "copies"',
        ),
        (
            {"shard": 2, "expert_token_groups": 2},
            {"moe": MOE},
            "expert_token_groups must be 1 where no tokens travel to experts, got 2",
        ),
        ({"shard": 2, "expert_tensor": 2}, {}, "expert_tensor must be 1 for a model without"),
        ({"tensor": 2}, {"linear_attn_norm_groups": 4}, None),
        (
            {"tensor": 4},
            {"linear_attn_norm_groups": 2},
            "tensor must divide linear_attn_norm_groups = 2, got 4",
        ),
        ({"pipeline": 8}, {}, r"pipeline \* pipeline_stages must not exceed .* = 4, got 8"),
        ({"pipeline_stages": 2}, {}, "pipeline_stages must be 1 without pipeline ranks, got 2"),
        (
            {"pipeline": 2},
            {"tie_word_embeddings": True},
            "pipeline must be 1 with tie_word_embeddings, .* got 2",
        ),
        (
            {"shard": 2, "context_attention": "ring"},
            {},
            "context_attention must be unset without context ranks and layers of full_attention",
        ),
        (
            {"context": 2, "context_attention": "ring"},
            {"layer_types": ["linear_attention"], "sliding_window": None},
            "context_attention must be unset .* got 'ring'",
        ),
        (
            {"shard": 8, "tensor": 4},
            {},
            r"shard \* context \* tensor must divide num_attention_heads \* head_dim = 16, got 32",
        ),
        ({"shard": 2, "gather_once": True}, {}, None),
        (
            {"tensor": 2, "gather_once": True},
            {},
            "gather_once must be unset where no ranks divide weights, got true",
        ),
        ({"shard": 2, "gather_dtype": "bf16"}, {"moe": MOE}, None),
        ({"shard": 2, "gather_dtype": "bf16"}, {}, "gather_dtype must be unset without experts"),
        (
            {"gather_dtype": "bf16"},
            {"moe": MOE},
            r"gather_dtype must be unset .* context = 1",
        ),
        (
            {"shard": 2, "tensor": 2, "gather_dtype": "bf16"},
            {"moe": MOE},
            r"gather_dtype must be unset .* got 'bf16' with tensor = 2",
        ),
    ],
)
def test_degrees_that_do_not_suit_the_model(
    parallel: dict, changes: dict, message: str | None
) -> None:
    model = parse_config(ModelConfig, MODEL | changes, "test")
    if message is None:
        ParallelConfig(**parallel).check_model(model)
        return
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**parallel).check_model(model)


def test_rounded_weights_are_for_autocast() -> None:
    fields = {"parallel": {"shard": 2, "gather_dtype": "bf16"}}
    with pytest.raises(ConfigError, match=r"gather_dtype must be unset without precision.autocast"):
        run_config(model=MODEL | {"moe": MOE}, **fields)
    found = run_config(model=MODEL | {"moe": MOE}, precision={"autocast": "bf16"}, **fields)
    assert found.parallel.gather_dtype == "bf16"


def test_copies_are_for_gpus() -> None:
    fields = {"parallel": {"shard": 2, "weight_exchange": "copies"}}
    message = r'weight_exchange must be "collective" with run.device = "cpu", which has no copy'
    with pytest.raises(ConfigError, match=message):
        run_config(**fields)
    found = run_config(run={"steps": 1, "out": "run", "device": "cuda"}, **fields)
    assert found.parallel.weight_exchange == "copies"


def test_rows_that_do_not_divide() -> None:
    message = r"replicate \* shard must divide the rows of a micro-batch of a step = 3, got 2"
    with pytest.raises(ConfigError, match=message):
        run_config(parallel={"shard": 2}, batch={"tokens_per_step": 96, "micro_batch_rows": 3})
    message = "divide the rows of the last micro-batch of a step = 1, got 2"
    with pytest.raises(ConfigError, match=message):
        run_config(parallel={"shard": 2}, batch={"tokens_per_step": 80, "micro_batch_rows": 4})
    with pytest.raises(ConfigError, match="a micro-batch of validation = 5, got 2"):
        run_config(parallel={"replicate": 2}, validation={"every_steps": 1, "num_samples": 5})
    message = (
        r"2 \* context must divide the tokens of a rank's rows in a micro-batch of a step = 20"
    )
    with pytest.raises(ConfigError, match=message):
        run_config(
            parallel={"context": 8},
            data={"path": "data", "seq_len": 20},
            batch={"tokens_per_step": 20},
        )


def test_micro_batches_that_do_not_suit_a_pipeline() -> None:
    pipeline = {"pipeline": 2}
    message = "micro_batch_rows, under pipeline, must divide the rows of a step = 5, got 2"
    with pytest.raises(ConfigError, match=message):
        run_config(parallel=pipeline, batch={"tokens_per_step": 80, "micro_batch_rows": 2})
    message = "micro-batches of a step must be at least pipeline = 2, got 1; set batch.micro_ba"
    with pytest.raises(ConfigError, match=message):
        run_config(parallel=pipeline, batch={"tokens_per_step": 80})
    message = "micro-batches of a step must be a multiple of pipeline = 2, got 3"
    with pytest.raises(ConfigError, match=message):
        run_config(
            parallel=pipeline | {"pipeline_stages": 2},
            batch={"tokens_per_step": 96, "micro_batch_rows": 2},
        )
    run_config(parallel=pipeline, batch={"tokens_per_step": 96, "micro_batch_rows": 2})


def test_tokens_that_tensor_ranks_cannot_share() -> None:
    message = "tensor must divide the tokens of a stretch in a micro-batch of a step = 5, got 2"
    with pytest.raises(ConfigError, match=message):
        run_config(
            parallel={"tensor": 2, "context": 2, "expert": 2},
            model=MODEL | {"moe": MOE},
            data={"path": "data", "seq_len": 20},
            batch={"tokens_per_step": 20},
        )


def test_compilation_is_for_one_process() -> None:
    with pytest.raises(ConfigError, match=r"compile\.enabled must be false with 2 ranks"):
        run_config(parallel={"shard": 2}, compile={"enabled": True})


def test_a_misspelt_degree_is_named() -> None:
    with pytest.raises(ConfigError, match=r"parallel.tensr .* did you mean parallel.tensor"):
        run_config(parallel={"tensr": 2})


def test_degrees_must_make_the_processes() -> None:
    message = r"must be the number of processes of the run, 8, got 1 \* 2 \* 1 \* 2 \* 1 = 4"
    with pytest.raises(ConfigError, match=message):
        check_num_ranks(ParallelConfig(replicate=2, context=2), 8)
    with pytest.raises(ConfigError, match=r"run, 1, got .* `torchrun --nproc-per-node 2 --no-pyt"):
        Layout.join(ParallelConfig(shard=2), "cpu")


def test_every_rank_has_a_place_of_its_own() -> None:
    config = ParallelConfig(replicate=2, shard=2, context=2, tensor=3, expert=4)
    places = [place_of(config, rank) for rank in range(config.num_ranks)]
    assert len({(p.data, p.context, p.tensor) for p in places}) == 24
    assert places[0] == Place(0, 0, 0, 0)
    assert places[3 + 1] == Place(0, 1, 1, 1, 1)
    assert places[23] == Place(3, 1, 2, 3, 2)
    # An expert group is whole: next to each other but for the experts' width.
    assert [p.expert for p in places[::3]] == [0, 1, 2, 3] * 2
    assert [p.expert_tensor for p in places[:6]] == [0, 1, 2] * 2
    apart = ParallelConfig(pipeline=2, shard=2, tensor=2, expert=2, expert_tensor=1)
    places = [place_of(apart, rank) for rank in range(apart.num_ranks)]
    assert [p.expert for p in places] == [0, 1] * 4
    assert {p.expert_tensor for p in places} == {0}
    assert [p.stage for p in places] == [0] * 4 + [1] * 4


def test_stages_hold_every_layer_once_in_turn() -> None:
    config = ParallelConfig(pipeline=2, pipeline_stages=2)
    first, second = (rank_stages(config, 7, rank) for rank in range(2))
    assert [list(stage.layers) for stage in first] == [[0, 1], [4, 5]]
    assert [list(stage.layers) for stage in second] == [[2, 3], [6]]
    assert [(s.is_first, s.is_last) for s in (*first, *second)] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]


def test_a_layout_of_one_process_has_no_mesh() -> None:
    layout = Layout(ParallelConfig())
    assert layout.agree(True)
    assert not layout.agree(False)
    with pytest.raises(ValueError, match="several processes to have a mesh, got one"):
        layout.group("tensor")
