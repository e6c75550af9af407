"""The recipe of long context after runs over ranks."""

from pathlib import Path

import pytest
from train_helpers import config_of, run_table

from sevenfold.models.presets import preset
from sevenfold.train.recipe import long_context_stages


@pytest.mark.parametrize(
    ("degrees", "rows"),
    [
        ({}, [6, 2, 1]),
        ({"shard": 4}, [8, 4, 4]),
        ({"pipeline": 2}, [6, 2, 2]),
        ({"pipeline": 4}, [6, 4, 4]),
        ({"pipeline": 4, "pipeline_stages": 2}, [8, 4, 4]),
        ({"pipeline": 2, "shard": 2}, [6, 4, 4]),
    ],
    ids=str,
)
def test_a_step_of_a_stage_feeds_all_ranks_of_its_pipeline(
    tmp_path: Path, degrees: dict, rows: list[int]
) -> None:
    data = degrees.get("shard", 1)
    model = preset("nano-hybrid").model_dump(mode="json") | {"tie_word_embeddings": False}
    base = config_of(
        run_table(Path("tokens"), tmp_path / "base"),
        model=model | {"layer_types": ["linear_attention"] * 8},
        parallel=degrees,
        data={"seq_len": 512},
        batch={"tokens_per_step": 12_288, "micro_batch_rows": data},
        validation={"every_steps": 4, "num_samples": 32},
    )
    stages = long_context_stages(base, longest_tokens=16_384, stage_tokens=9_000_000).values()
    assert [s.batch.tokens_per_step // s.data.seq_len for s in stages] == rows
    assert {s.batch.micro_batch_rows for s in stages} == {data}
