"""The serving benchmarks on a tiny model: right before fast, floors of accounting, data."""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from sevenfold.bench.serving import decode, sides
from sevenfold.bench.serving.agreement import check_sides, check_tokens
from sevenfold.bench.serving.sides import Rates, Serving, Sides, build_sides
from sevenfold.cli.bench import bench_app
from sevenfold.engine.sizing import size_engine
from sevenfold.engine.speculation import SpeculationConfig
from sevenfold.models import HybridModel, init_weights, preset
from sevenfold.models.accounting import count_parameters, decode_bytes, kv_bytes, state_bytes
from sevenfold.models.presets import hybrid_layers

SMALL = preset("bench-19m").model_copy(
    update={
        "vocab_size": 50,
        "hidden_size": 16,
        "layer_types": hybrid_layers(2),
        "head_dim": 8,
        "rotary_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
    }
)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """A tiny preset, rates that are known, memory of 8 MiB."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    of = {"small": SMALL, "minimax-text-01": preset("minimax-text-01")}

    def sized(model: HybridModel, *, budget_bytes: int | None, **options: SpeculationConfig | None):
        return size_engine(model, budget_bytes=budget_bytes or 1 << 23, **options)

    fakes = {"preset": of.__getitem__, "measured_rates": lambda device: Rates(1e9, 1e9)}
    with mock.patch.multiple(sides, size_engine=sized, **fakes):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def both(_small: None) -> Sides:
    return build_sides("small", "cpu", torch.float32)


def test_sides_that_agree_pass_and_others_do_not(both: Sides) -> None:
    errors = check_sides(both)
    assert 0 < errors["ours_error"] <= 2 * errors["transformers_error"] + 1e-6
    other = build_sides("small", "cpu", torch.float32)
    init_weights(other.model, seed=1)
    with pytest.raises(AssertionError, match="the peer must be the same model, got"):
        check_sides(other)


def test_a_wrong_token_is_found(both: Sides) -> None:
    serving = Serving(both.model)
    request = serving.submit([3, 4, 5], 6)
    serving.run()
    check_tokens(both.model, [3, 4, 5], request.generated)
    wrong = [*request.generated[:3], (request.generated[3] + 1) % 50, *request.generated[4:]]
    with pytest.raises(AssertionError, match="the engine's tokens must be the model's best"):
        check_tokens(both.model, [3, 4, 5], wrong)


def test_a_steps_bytes_are_accountings() -> None:
    assert decode.step_bytes(SMALL, 1, 30, 4) == decode_bytes(SMALL, 30, 4)
    parameters = count_parameters(SMALL)
    most = parameters.total - parameters.embedding - parameters.norms
    cache = 2 * state_bytes(SMALL) + kv_bytes(SMALL, 30, 4)
    assert decode.step_bytes(SMALL, 10_000, 30, 4) == 4 * most + 10_000 * cache


def rows(tmp_path: Path, *arguments: str) -> list[dict]:
    out = tmp_path / "out.json"
    common = ("--preset", "small", "--repeats", "1", "--out", str(out))
    done = CliRunner().invoke(bench_app, [*arguments, *common], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    words = record["command"].split()
    assert words[:3] == ["sevenfold", "bench", arguments[0]]
    given = [*arguments[1:], "--preset", "small", "--repeats", "1"]
    assert sorted(words[3:]) == sorted(given)  # every option that was given, the file apart
    assert all(row["ours_s"] > 0 for row in record["cases"])
    assert all(row["dtype"] == "float32" for row in record["cases"])
    return record["cases"]


def test_prefill(tmp_path: Path) -> None:
    lengths = ("--lengths", "64", "--lengths", "130", "--lengths", "150")
    limits = ("--peer-most-tokens", "100", "--twin-most-tokens", "140")
    first, second, third = rows(tmp_path, "prefill", *lengths, *limits)
    assert (first["tokens"], second["tokens"], third["tokens"]) == (64, 130, 150)
    assert first["ratio"] == first["transformers_s"] / first["ours_s"]
    assert second["transformers_s"] is second["ratio"] is None
    assert second["softmax_twin_s"] > 0
    assert third["softmax_twin_s"] is None
    assert second["floor_s"] > first["floor_s"]


def test_decode(tmp_path: Path) -> None:
    sizes = ("--batches", "1", "--batches", "3", "--prompt-tokens", "20", "--new-tokens", "5")
    one, three = rows(tmp_path, "decode", *sizes)
    assert one["ours_tokens_per_s"] == 1 / one["ours_s"]
    assert three["ours_tokens_per_s"] == 3 / three["ours_s"]
    assert three["floor_s"] == decode.step_bytes(SMALL, 3, 20, 4) / 1e9


def test_speculate(tmp_path: Path) -> None:
    sizes = ("--prompt-tokens", "40", "--new-tokens", "40")
    copying, hostile = rows(tmp_path, "speculate", *sizes)
    assert copying["ratio"] == copying["plain_s"] / copying["ours_s"]
    assert 0 < copying["accepted_tokens"] == copying["drafted_tokens"]
    assert hostile["accepted_tokens"] == hostile["drafted_tokens"] == 0, "it is seen to be wrong"


def test_serve(tmp_path: Path) -> None:
    [row] = rows(tmp_path, "serve", "--lengths", "200")
    assert row["tokens"] == 200 + 16 + 64
    assert row["cached_tokens"] == 192, "the first turn's whole pages, and nothing of the question"
    assert row["cached_tokens_again"] == 256, "whole pages of the question, too"
    assert row["share_of_whole"] == row["ours_s"] / row["ours_whole_s"]
    assert row["share_of_whole_again"] == row["ours_again_s"] / row["ours_whole_s"]
    # Whole pages, and room for the output that was promised.
    assert row["accounted_bytes"] <= row["request_bytes"]
