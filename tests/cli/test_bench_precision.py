"""`sevenfold bench precision`: its measure on a tiny model, and the page made of its record."""

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import TinyRun

from sevenfold.bench.precision import Chats, compare, run_precision_benchmark
from sevenfold.bench.precision_states import run_state_benchmark
from sevenfold.bench.precision_table import model_table, state_table
from sevenfold.models.accounting import weight_bytes
from sevenfold.models.checkpoint import read_config

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "benchmarks" / "results" / "precision" / "demo-hybrid.json"


def test_the_model_s_figures(tiny_run: TinyRun) -> None:
    size = {"num_texts": 2, "num_turns": 2, "turn_tokens": 9}
    rows = run_precision_benchmark(tiny_run.checkpoint, lambda row: None, **size)
    found = {row["case"]: row for row in rows}
    exact = found["snapshots fp32"]
    assert (exact["logit_error"], exact["kl_max"], exact["same_top"]) == (0, 0, 1)
    # Two heads of 8 x 8 in one layer; a ring of 16 keys and values in fp32.
    half, eighth = 2 * (2 * 64 + 4), 2 * (64 + 4 * 8)
    assert found["snapshots fp16"]["bytes"] == half
    assert found["snapshots int8"]["bytes"] == eighth
    assert found["states int8"]["bytes"] == eighth + 2 * (2 * 16 * 8 * 4 + 4)
    config = read_config(tiny_run.checkpoint)
    assert found["weights int8"]["bytes"] == weight_bytes(config, "int8", 4)
    for name in set(found) - {"snapshots fp32"}:
        assert 0 < found[name]["logit_error"] < 0.1, name
        assert 0 < found[name]["kl"] <= found[name]["kl_max"], name
    assert found["snapshots fp16"]["logit_error"] < found["snapshots int8"]["logit_error"]


def test_figures_are_what_they_say() -> None:
    """Two tokens after the first turn count; the last has no next one."""
    chats = Chats(torch.tensor([[0, 1, 2, 1]]), turn_tokens=1)
    exact = [torch.tensor([[0.0, 1.0, -1.0]])] * 4
    found = [torch.tensor([[9.0, 9.0, 0.0]]), exact[0], torch.tensor([[3.0, 1.0, -1.0]]), exact[0]]
    figures = compare(exact, iter(found), chats)
    assert figures["logit_error_max"] == 3
    # A difference of 3 in one of 6 elements, whose spread is 2/3.
    assert figures["logit_error"] == pytest.approx((9 / 6 / (2 / 3)) ** 0.5)
    assert figures["same_top"] == 0.5
    p, q = (x[2].double().log_softmax(-1)[0] for x in (exact, found))
    assert figures["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()) / 2)
    assert figures["kl_max"] == pytest.approx(2 * figures["kl"])
    assert figures["loss_change"] == pytest.approx(float(p[1] - q[1]) / 2)


def test_slow_heads_need_more_than_rounding_to_nearest() -> None:
    rows = {row["case"]: row for row in run_state_benchmark(num_tokens=128)}
    slow = {name: row["layer_78"] for name, row in rows.items()}
    assert slow["states fp32"] < slow["states fp16, stochastic"] < slow["states bf16, to nearest"]
    assert slow["states int8, ring of 16"] < slow["states int8, every token"]
    # Too short for a snapshot.
    assert slow["snapshots int8 every 512 tokens"] == slow["states fp32"]


def test_the_page_shows_the_record() -> None:
    cases = json.loads(RECORD.read_text())["cases"]
    page = (ROOT / "docs" / "low-precision.md").read_text()
    assert model_table(cases) in page
    assert state_table(cases) in page
