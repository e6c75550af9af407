"""The kernel benchmark's tables, notes, crossovers and figure, from rows made by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sevenfold.bench.kernels.cases import Task
from sevenfold.bench.kernels.crossover import crossover, sweep_curves
from sevenfold.bench.kernels.plot import draw
from sevenfold.bench.kernels.table import group_table, quantity, render, summary


def row(side: str, median_s: float | None, **changes: Any) -> dict[str, Any]:
    base = {
        "case": "forward B1 T1024 H4",
        "groups": ["forward"],
        "task": str(Task.FORWARD),
        "B": 1024,
        "T": 1024,
        "target": None,
        "floor_s": 0.5e-3,
        "side": side,
        "ours": side.startswith("sevenfold"),
        "status": "ok",
        "error": 2e-3,
        "median_s": median_s,
        "over_floor": None if median_s is None else median_s / 0.5e-3,
    }
    return base | changes


ROWS = [
    row("sevenfold", 0.6e-3, target=0.58e-3),
    row("fla chunk", 1.5e-3),
    row("seg_la", 0.3e-3, status="wrong", error=0.25),
    row("lightning-attn", None, status="failed", note="RuntimeError: no"),
    row("sevenfold", 0.7e-3, case="forward B2"),
    row("fla chunk", 0.5e-3, case="forward B2"),
]


def test_a_table_has_ratios_to_floor_and_to_ours() -> None:
    assert group_table(ROWS) == [
        "| case | floor | target on an H200 | sevenfold | fla chunk | seg_la | lightning-attn |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| forward B1 T1024 H4 | 0.500 ms | 0.580 ms | **0.600 ms** (1.20 x floor) "
        "| 1.500 ms (2.50x) | wrong: 0.300 ms (0.50x) | failed |",
        "| forward B2 | 0.500 ms | – | **0.700 ms** (1.40 x floor) | 0.500 ms (0.71x) |  |  |",
    ]


def test_a_summary_ranks_what_is_right() -> None:
    assert summary(ROWS) == [
        "forward B1 T1024 H4: sevenfold 0.600 ms, 1.20 x floor, target 0.580 ms, "
        "best peer fla chunk 1.500 ms, 2.50x ours",
        "forward B2: sevenfold 0.700 ms, 1.40 x floor, best peer fla chunk 0.500 ms, 0.71x ours",
    ]
    assert summary(ROWS[2:4]) == ["forward B1 T1024 H4: no right result"]


def test_the_better_of_our_two_forms_counts() -> None:
    decoding = [row("sevenfold", 0.4e-3), row("sevenfold ring", 0.2e-3), row("seg_la", 0.5e-3)]
    assert summary(decoding)[0].endswith("best peer seg_la 0.500 ms, 2.50x ours")


@pytest.mark.parametrize(
    ("task", "value", "shown"),
    [
        (Task.FORWARD, 4.81e-6, "4.8 µs"),
        (Task.FORWARD, 0.286e-3, "0.286 ms"),
        (Task.FORWARD, 10.66e-3, "10.66 ms"),
        (Task.FORWARD, 0.4214, "421.4 ms"),
        (Task.FORWARD, 3.679, "3,679 ms"),
        (Task.FORWARD, None, "–"),
        (Task.MEMORY, 8.59e9, "8.59 GB"),
        (Task.MEMORY, 33_554_432, "33.6 MB"),
        (Task.MEMORY, None, "0"),
    ],
)
def test_quantities(task: Task, value: float | None, shown: str) -> None:
    assert quantity({"task": str(task)}, value) == shown


def sweep(side: str, T: int, median_s: float, **changes: Any) -> dict[str, Any]:
    B = max(1, 2**20 // T)
    return row(side, median_s, case=f"sweep T{T}", groups=["sweep"], B=B, T=T, **changes)


SWEEP = [
    sweep("sevenfold", 4096, 2e-3),
    sweep("sevenfold", 1024, 1e-3),
    sweep("sevenfold", 2**22, 8e-3),
    sweep("softmax flash", 1024, 0.5e-3),
    sweep("softmax flash", 4096, 4e-3),
    sweep("softmax cuDNN", 1024, 3e-3),
    sweep("softmax cuDNN", 4096, 9e-3, status="wrong", error=0.5),
]


def test_curves_are_of_right_rows_per_million_tokens() -> None:
    curves = sweep_curves([*SWEEP, *ROWS])
    assert list(curves["sevenfold"].items()) == [(1024, 1e-3), (4096, 2e-3), (2**22, 2e-3)]
    assert curves["softmax cuDNN"] == {1024: 3e-3}
    assert "fla chunk" not in curves


def test_a_crossover_lies_where_straight_lines_meet() -> None:
    """From half of ours to twice ours over two doublings: they meet after one."""
    found = crossover({1024: 1e-3, 4096: 2e-3, 8192: 9.0}, {1024: 0.5e-3, 4096: 4e-3})
    assert found is not None
    assert round(found) == 2048


@pytest.mark.parametrize(
    ("theirs", "tokens"),
    [
        ({1024: 2.0, 2048: 3.0}, 1024.0),  # faster throughout
        ({1024: 0.5, 2048: 0.5}, None),  # slower throughout
        ({512: 9.0}, None),  # no common length
        ({1024: 9.0, 2048: 0.5}, None),  # slower in the end
        ({1024: 1.0, 2048: 4.0}, 1024.0),  # even at the first length
    ],
)
def test_crossovers_at_the_borders(theirs: dict[int, float], tokens: float | None) -> None:
    assert crossover({1024: 1.0, 2048: 1.0}, theirs) == tokens


RECORD = {
    "device": "NVIDIA H200",
    "date": "2026-11-22",
    "python": "3.12.3",
    "cuda": "13.0",
    "commit": None,
    "sides": {
        "sevenfold": {"package": "sevenfold", "version": "0.1.0", "installed": True},
        "seg_la": {"package": "sglang", "version": None, "installed": True},
        "fla chunk": {"package": "fla-core", "version": "0.6.0", "installed": False},
    },
    "ceilings": {"copy_bytes_per_s": 4.27e12, "matmul_flops_per_s": 6.85e14},
    "rows": [
        *ROWS,
        *SWEEP,
        row(
            "sevenfold",
            0.2e-3,
            groups=["verify"],
            case="verify",
            task=str(Task.VERIFY),
            extra_bytes=2e6,
        ),
    ],
}


def test_a_page_says_everything() -> None:
    lines = render(RECORD)
    assert lines[0] == (
        "NVIDIA H200: copy 4.27 TB/s, bf16 matmul 685 TFLOP/s. CUDA 13.0, Python 3.12.3, "
        "sevenfold 0.1.0; commit unknown, 2026-11-22."
    )
    titles = [line for line in lines if line.startswith("###")]
    assert titles == [
        "### Forward",
        "### Verification of a draft, one layer",
        "### Length sweep, 4 heads",
    ]
    faster = "- Ours is faster than softmax"
    assert f"{faster} flash from 2,048 tokens on; at 4,096 tokens 2 times." in lines
    assert f"{faster} cuDNN from 1,024 tokens on; at 1,024 tokens 3 times." in lines
    assert "- Memory of the draft in verification: sevenfold 2.0 MB." in lines
    assert "- forward B1 T1024 H4, seg_la: wrong, relative error 2.5e-01." in lines
    assert "- forward B1 T1024 H4, lightning-attn: failed: RuntimeError: no." in lines
    assert "- sweep T4096, softmax cuDNN: wrong, relative error 5.0e-01." in lines


def test_the_figure_shows_curves_floor_and_crossovers(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        draw(SWEEP, "NVIDIA H200", 4.27e12, path)
    text = first.read_text()
    assert text == second.read_text()
    for shown in (
        "softmax, FlashAttention-2",
        "floor: bytes at copy speed",
        "NVIDIA H200",
        "from 2,048 tokens",
        "from 1,024 tokens or less",
        "ms per 1,048,576 tokens",
    ):
        assert shown in text, shown
    assert "fla (chunk)" not in text


def test_the_floor_of_the_figure_is_that_of_a_million_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.axhline", lambda _self, y, **_: drawn.append(y))
    draw(SWEEP, "x", 2.0**32, tmp_path / "a.svg")
    # Four tensors of 4 heads, 128 wide, 2 bytes: 2^32 bytes in a second.
    [floor_ms] = drawn
    assert math.isclose(floor_ms, 1000.0, rel_tol=torch.finfo(torch.float64).eps)
