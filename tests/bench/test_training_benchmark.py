"""The training benchmark on tiny models: right before fast, floors of accounting, data."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sevenfold.bench.training import agreement, measure
from sevenfold.bench.training.cases import OURS, PEER, Case, cases_of
from sevenfold.bench.training.run import write_rows
from sevenfold.bench.training.table import summary
from sevenfold.cli.bench import bench_app
from sevenfold.config import ConfigError
from sevenfold.models import HybridModel, init_weights, preset
from sevenfold.models.accounting import count_parameters, training_flops

CPU = torch.device("cpu")
SMALL = Case("step", OURS, "nano-hybrid", 2, 16)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose rate is known, two timed steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(measure, "matmul_flops_per_s", lambda: 1e9)
    monkeypatch.setattr(measure, "MAX_STEPS", measure.WARM_UP_STEPS + 2)
    yield
    torch.set_num_threads(before)


def test_the_cases_are_the_issues() -> None:
    names = [(case.group, case.side, case.name) for case in cases_of()]
    for shape in ("8 x 2,048", "4 x 8,192", "1 x 32,768"):
        assert ("step", OURS, f"bench-2b {shape}") in names
        assert ("step", PEER, f"bench-2b {shape}") in names
    lengths = [case for case in cases_of(["context"]) if case.model == "1b-softmax"]
    assert [case.tokens for case in lengths] == [2048 * 2**i for i in range(7)]
    assert {case.tokens * case.rows for case in lengths} == {131_072}
    assert [case.target_share for case in cases_of(["mfu"])] == [0.5]


def test_a_part_of_the_cases_is_chosen_by_options() -> None:
    [one] = cases_of(["step"], [PEER], ["1 x 32,768"])
    assert (one.side, one.rows, one.tokens) == (PEER, 1, 32_768)
    assert one.config.rotary_dim == preset("bench-2b").head_dim
    with pytest.raises(ConfigError, match="group must be a known name, got 'steps'; did you mean"):
        cases_of(["steps"])
    with pytest.raises(ConfigError, match="only must be a part of a chosen case's name, got"):
        cases_of(["step"], names=["7 x 3"])


@pytest.mark.parametrize("side", [OURS, PEER])
def test_a_row_is_made_of_steps_and_accounting(side: str) -> None:
    row = measure.measure(replace(SMALL, side=side), CPU)
    config = SMALL.config
    active = count_parameters(config).active + config.vocab_size * config.hidden_size
    assert row["timed_steps"] == 2
    assert row["tokens_per_s"] == 32 / row["step_s"]
    assert row["floor_tokens_per_s"] == 1e9 / (6 * active)
    flops = training_flops(config, [16, 16])
    assert row["share_of_matmul"] == flops / row["step_s"] / 1e9
    assert row["loss_error"] < 1e-3
    assert row["peak_bytes"] >= 0


def test_our_step_is_the_trainers() -> None:
    trainer, _ = measure.build_ours(replace(SMALL, recompute=True), CPU)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    step = trainer.read(0)
    assert (step.num_rows, step.num_labels, len(step.micro_batches)) == (2, 32, 1)
    assert trainer.config.checkpointing.every_layers == 1
    assert (
        trainer.loader.sample(3).input_ids.tolist() == trainer.loader.sample(3).input_ids.tolist()
    )
    assert trainer.loader.sample(3).labels[:-1].tolist() == (
        trainer.loader.sample(3).input_ids[1:].tolist()
    )
    assert before.keys() == dict(trainer.model.named_parameters()).keys()


def test_a_wrong_side_is_not_timed() -> None:
    right, wrong = (init_weights(HybridModel(SMALL.config), seed=seed) for seed in (0, 0))
    exact = agreement.exact_values(right)
    assert agreement.check_ours(right, exact, None)["grad_norm_error"] < 1e-3
    with torch.no_grad():
        wrong.layers[0].self_attn.out_proj.weight *= 1.5
    with pytest.raises(AssertionError, match="errors before timing must not exceed"):
        agreement.check_ours(wrong, exact, None)


def figures(case: str, side: str, tokens_per_s: float, **more: object) -> dict:
    row = {
        "case": case,
        "group": "step",
        "side": side,
        "model": "m",
        "tokens": 1,
        "status": "ok",
        "tokens_per_s": tokens_per_s,
        "floor_tokens_per_s": 100.0,
        "share_of_matmul": 0.25,
        "peak_bytes": 2**31,
        "target_tokens_per_s": 50.0,
        "target_share": None,
    }
    return row | more


def test_the_summary_compares() -> None:
    rows = [figures("a", OURS, 60.0), figures("a", PEER, 30.0)]
    lengths = [
        figures("b", OURS, speed, group="context", model=model, tokens=tokens)
        for model, tokens, speed in (("h", 10, 8.0), ("h", 20, 6.0), ("s", 10, 4.0), ("s", 20, 1.0))
    ]
    lines = summary(rows + lengths)
    assert lines[2] == "| a | 60 | 30 | 2.00 | 100 | 50 | 25.0% | 2.0 |"
    assert lines[4] == "| tokens of a row | h, tokens/s | kept | s, tokens/s | kept |"
    assert lines[-1] == "| 20 | 6 | 75% | 1 | 25% |"


def test_rows_of_parts_join_in_one_record(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_rows(path, [figures("a", OURS, 1.0), figures("b", OURS, 2.0)], "cpu", "abc")
    rows = write_rows(path, [figures("b", OURS, 3.0), figures("b", PEER, 4.0)], "cpu", "def")
    found = [(row["case"], row["side"], row["tokens_per_s"], row["commit"]) for row in rows]
    assert found == [("a", OURS, 1.0, "abc"), ("b", OURS, 3.0, "def"), ("b", PEER, 4.0, "def")]
    assert json.loads(path.read_text())["rows"] == rows


def test_the_command_runs_each_case_in_its_own_process(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    arguments = ["train", "--tiny", "--device", "cpu", "--group", "mfu", "--out", str(out)]
    done = CliRunner().invoke(bench_app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    [row] = json.loads(out.read_text())["rows"]
    assert (row["case"], row["status"], row["tokens"]) == ("nano-hybrid 2 x 128", "ok", 128)
    assert f"written to {out}" in done.output
