"""The CPU benchmark: no side is timed that is wrong, and its floors are accounting's."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sevenfold.bench import cpu, peer
from sevenfold.cli.bench import bench_app
from sevenfold.config import UnsupportedError
from sevenfold.models import HybridModel, init_weights, preset
from sevenfold.models.accounting import decode_bytes, prefill_flops, training_flops

SMALL = preset("bench-19m").model_copy(
    update={
        "vocab_size": 50,
        "hidden_size": 16,
        "head_dim": 8,
        "rotary_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
    }
)


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "preset", lambda _name: SMALL)
    monkeypatch.setattr(cpu, "THREADS", 1)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FakePeer:
    """Our own model behind transformers' interface, with an error put on its logits."""

    def __init__(self, model: HybridModel, error: float = 0.0) -> None:
        self.model, self.error = model, error

    def eval(self) -> "FakePeer":
        return self

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        with torch.inference_mode():
            logits = self.model(ids)
        logits[0, 0, 0] += self.error * logits.abs().max()
        return SimpleNamespace(logits=logits)


@pytest.fixture
def model() -> HybridModel:
    return cpu.build_model()


def test_the_model_is_always_the_same() -> None:
    first, second = cpu.build_model(), cpu.build_model()
    assert first.config == SMALL
    assert not first.training
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_sides_that_agree_pass(model: HybridModel) -> None:
    errors = cpu.check_sides(model, FakePeer(model))
    assert list(errors) == ["ours_error", "transformers_error"]
    assert 0 < errors["ours_error"] == errors["transformers_error"] < 1e-5


def test_a_peers_own_small_error_is_named(model: HybridModel) -> None:
    """transformers' decay differs by 1e-5 in one place: an error of less than 1e-3 passes."""
    errors = cpu.check_sides(model, FakePeer(model, error=5e-4))
    assert 4e-4 < errors["transformers_error"] < 6e-4
    assert errors["ours_error"] < 1e-5


def test_a_peer_that_is_another_model_fails(model: HybridModel) -> None:
    for wrong in (FakePeer(model, error=2e-3), FakePeer(init_weights(HybridModel(SMALL), seed=1))):
        with pytest.raises(AssertionError, match="the peer must be the same model, got"):
            cpu.check_sides(model, wrong)


def test_ours_wrong_fails(model: HybridModel) -> None:
    right = FakePeer(cpu.build_model())
    with torch.no_grad():
        model.norm.weight[0] *= 1 + 1e-4
    with pytest.raises(AssertionError, match="ours must keep to the error rule, got"):
        cpu.check_sides(model, right)


@pytest.mark.parametrize("name", ["forward 1 x 2,048", "forward 1 x 16,384"])
def test_a_forwards_floor_is_its_flops(name: str) -> None:
    number = int(name.split()[-1].replace(",", ""))
    floor_s = cpu.cases()[name].floor_s
    assert floor_s(2.0, 1e9) == prefill_flops(SMALL, number) / 2
    assert floor_s(4.0, 1e-9) == prefill_flops(SMALL, number) / 4  # whatever memory does


def test_the_floor_of_decoding_is_its_bytes_in_fp32() -> None:
    floor_s = cpu.cases()["decode"].floor_s
    assert floor_s(1e-9, 2.0) == 64 * decode_bytes(SMALL, 128, 4) / 2


def test_the_floor_of_training_is_its_flops() -> None:
    floor_s = cpu.cases()["training step 4 x 1,024"].floor_s
    assert floor_s(2.0, 1e-9) == training_flops(SMALL, [1024] * 4) / 2
    assert floor_s(2.0, 1e9) == 4 * training_flops(SMALL, [1024]) / 2


def test_our_decoding_is_greedy_generation(
    model: HybridModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "PROMPT_TOKENS", 9)
    monkeypatch.setattr(cpu, "NEW_TOKENS", 5)
    ids = cpu._ids(1, 9)
    run = cpu.cases()["decode"].ours(model)
    tokens = run()
    assert run() == tokens
    for token in tokens:
        assert token == int(model(ids)[0, -1].argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert ids.shape == (1, 14)


def test_our_training_step_moves_every_weight(
    model: HybridModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "TRAIN_ROWS", 2)
    monkeypatch.setattr(cpu, "TRAIN_TOKENS", 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = cpu.cases()["training step 4 x 1,024"].ours(model)
    step()
    first = [p.detach().clone() for p in model.parameters()]
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    step()
    assert not any(torch.equal(a, b) for a, b in zip(first, model.parameters(), strict=True))


def fake_case(name: str) -> cpu.Case:
    return cpu.Case(name, 2, lambda _: int, lambda _: int, lambda flops, read: flops + read, 1.5)


def test_a_row_for_each_case(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def check(model: HybridModel, other: FakePeer) -> dict[str, float]:
        checked.append((model, other))
        return {"ours_error": 0.25, "transformers_error": 0.5}

    def timed(sides: Mapping[str, Any], repeats: int) -> dict[str, float]:
        assert checked, "nothing is timed before it is checked"
        assert (list(sides), repeats) == (["ours", "transformers"], 2)
        return {"ours": 2.0, "transformers": 5.0}

    replaced = {
        "cases": lambda: {name: fake_case(name) for name in ("a", "b")},
        "load_peer": FakePeer,
        "check_sides": check,
        "interleaved_median_s": timed,
        "matmul_flops_per_s": lambda: 3.0,
        "read_bytes_per_s": lambda: 4.0,
        "_peak_in_own_process": lambda side, name: len(side) + 1000 * (name == "b"),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(cpu, name, value)
    reported: list[Mapping[str, Any]] = []
    rows = cpu.run_cpu_benchmark(reported.append)
    assert reported == rows
    assert [row["case"] for row in rows] == ["a", "b"]
    assert [row["transformers_peak_bytes"] for row in rows] == [12, 1012]
    assert rows[0] == {
        "case": "a",
        "ours_s": 2.0,
        "transformers_s": 5.0,
        "ratio": 2.5,
        "target_ratio": 1.5,
        "floor_s": 7.0,
        "ours_peak_bytes": 4,
        "transformers_peak_bytes": 12,
        "matmul_flops_per_s": 3.0,
        "read_bytes_per_s": 4.0,
        "ours_error": 0.25,
        "transformers_error": 0.5,
    }
    assert len(checked) == 1


def test_a_wrong_side_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load_peer", lambda model: FakePeer(model, error=0.1))
    monkeypatch.setattr(cpu, "interleaved_median_s", None)
    with pytest.raises(AssertionError, match="the peer must be the same model"):
        cpu.run_cpu_benchmark(lambda _row: None)


def test_the_peer_needs_transformers(model: HybridModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "find_spec", lambda _name: None)
    with pytest.raises(UnsupportedError, match=r"got no transformers; pip install sevenfold\[ben"):
        peer.load_peer(model)


def test_the_command_writes_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "case": "forward",
        "ours_s": 0.5,
        "transformers_s": 1.25,
        "ratio": 2.5,
        "target_ratio": 1.5,
        "floor_s": 0.25,
        "ours_peak_bytes": 3_000_000,
        "transformers_peak_bytes": 8_000_000,
    }

    def fake(report: Any) -> list[dict[str, Any]]:
        report(row)
        return [row]

    monkeypatch.setattr("sevenfold.cli.bench.run_cpu_benchmark", fake)
    out = tmp_path / "cpu.json"
    result = CliRunner().invoke(bench_app, ["cpu", "--out", str(out)])
    assert result.exit_code == 0
    said, written = result.output.splitlines()
    assert said.strip() == (
        "forward: ours 0.500 s, transformers 1.250 s, ratio 2.50 (target 1.5), floor 0.250 s; "
        "memory 3 against 8 MB"
    )
    assert written == f"written to {out}"
    record = json.loads(out.read_text())
    assert (record["command"], record["cases"]) == ("sevenfold bench cpu", [row])
