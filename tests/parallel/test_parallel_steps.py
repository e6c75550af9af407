"""Every layout takes the step that one process takes: loss, gradients, norm, weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parallel_cases import CASES
from parallel_helpers import Case, build, joined, run_ranks, take_step

from sevenfold.ops.testing import check_error
from sevenfold.parallel import Layout, ParallelConfig

ALONE = Layout(ParallelConfig())
_CASES_AT_ONCE = 10
_STEPS_OF_ONE: dict[str, dict] = {}
TWO = [case for case in CASES if case.config.num_ranks == 2]
QUICK = [case for case in TWO if not case.is_slow]
SLOW = [case for case in TWO if case.is_slow]
FOUR = [case for case in CASES if case.config.num_ranks == 4]
# Each of experts with one more division.
QUICK_FOUR = [c for c in FOUR if c.name in ("tensor-expert", "experts-wide", "pipeline-expert")]
SLOW_FOUR = [case for case in FOUR if case not in QUICK_FOUR]
EIGHT = [case for case in CASES if case.config.num_ranks == 8]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(QUICK, 2, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(SLOW, 2, tmp_path_factory.mktemp("slow"))


@pytest.fixture(scope="module")
def quick_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(QUICK_FOUR, 4, tmp_path_factory.mktemp("quick_four"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(SLOW_FOUR, 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(EIGHT, 8, tmp_path_factory.mktemp("eight"))


def ran(cases: list[Case], num_ranks: int, folder: Path) -> Path:
    """Many cases in one start of the processes."""
    for n in range(0, len(cases), _CASES_AT_ONCE):
        some = [case.name for case in cases[n : n + _CASES_AT_ONCE]]
        run_ranks("steps", num_ranks, folder, *some)
    return folder


def one_process(case: Case, dtype: torch.dtype) -> dict:
    """The step of one process: the same for all layouts of a model."""
    case = replace(case, name="", parallel={}, is_slow=False)
    case = replace(case, autocast=None, stream=None) if dtype is torch.float64 else case
    key = f"{case} {dtype}"
    if key not in _STEPS_OF_ONE:
        _STEPS_OF_ONE[key] = take_step(case, *build(case, ALONE, dtype), ALONE)
    return _STEPS_OF_ONE[key]


def agrees_with_one_process(case: Case, folder: Path) -> None:
    exact, eager = (one_process(case, dtype) for dtype in (torch.float64, torch.float32))
    ranks = [
        torch.load(folder / f"{case.name}.{rank}.pt", weights_only=False)
        for rank in range(case.config.num_ranks)
    ]
    for rank in ranks:
        assert (rank["labels"], rank["bytes"]) == (exact["labels"], exact["bytes"])
        by_copies = [how for how in case.parallel.values() if how == "copies"]
        # Of weights and of tokens; experts' weights may have their own.
        assert len(by_copies) <= rank["num_copies"] <= 2 * len(by_copies)
        for name in ("losses", "norm"):
            check_error(f"{case.name}: {name}", rank[name], rounded(case, eager[name]), exact[name])
    # AdamW's first step is a sign, which the rounding of bf16 turns where a gradient is near 0.
    for kind in ("gradients",) if case.autocast else ("gradients", "weights"):
        for name, whole in exact[kind].items():
            found = joined(case, ranks, kind, name, whole)
            known = rounded(case, eager[kind][name])
            check_error(f"{case.name}: {kind} {name}", found, known, whole)


def rounded(case: Case, eager: torch.Tensor) -> torch.Tensor:
    """What one process has, in the dtype of its products, whose eps the error rule counts."""
    return eager if case.autocast is None else eager.to(torch.bfloat16)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_two_ranks_take_the_step_of_one_process(case: Case, quick: Path) -> None:
    agrees_with_one_process(case, quick)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
def test_other_layouts_of_two_ranks_do_so_too(case: Case, slow: Path) -> None:
    agrees_with_one_process(case, slow)


@pytest.mark.parametrize("case", QUICK_FOUR, ids=lambda case: case.name)
def test_four_ranks_take_the_step_of_one_process(case: Case, quick_four: Path) -> None:
    agrees_with_one_process(case, quick_four)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_FOUR, ids=lambda case: case.name)
def test_other_layouts_of_four_ranks_do_so_too(case: Case, four: Path) -> None:
    agrees_with_one_process(case, four)


@pytest.mark.slow
@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
def test_eight_ranks_take_the_step_of_one_process(case: Case, eight: Path) -> None:
    agrees_with_one_process(case, eight)


def test_experts_drop_tokens_in_these_cases() -> None:
    dropping = [case for case in CASES if (case.model.get("moe") or {}).get("capacity_factor")]
    assert len(dropping) >= 4
    for case in dropping:
        assert one_process(case, torch.float64)["losses"][3] > 0
