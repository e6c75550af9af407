"""Every layout takes the step that one process takes: loss, gradients, norm, weights."""

from pathlib import Path

import pytest
import torch
from parallel_cases import CASES
from parallel_helpers import Case, build, joined, run_ranks, take_step

from sevenfold.ops.testing import check_error
from sevenfold.parallel import Layout, ParallelConfig

ALONE = Layout(ParallelConfig())
BY_RANKS = {n: [case for case in CASES if case.config.num_ranks == n] for n in (2, 4)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks("steps", 2, folder, *(case.name for case in BY_RANKS[2]))
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    run_ranks("steps", 4, folder, *(case.name for case in BY_RANKS[4]))
    return folder


def one_process(case: Case, dtype: torch.dtype) -> dict:
    return _one_process(repr(case.model), case.micro_batch_rows, case.recompute, dtype, (case,))


_CACHE: dict = {}


def _one_process(model: str, rows: int, recompute: bool, dtype: torch.dtype, by: tuple) -> dict:
    key = (model, rows, recompute, dtype)
    if key not in _CACHE:
        _CACHE[key] = take_step(by[0], *build(by[0], ALONE, dtype), ALONE)
    return _CACHE[key]


def agrees_with_one_process(case: Case, folder: Path) -> None:
    exact, eager = (one_process(case, dtype) for dtype in (torch.float64, torch.float32))
    ranks = [
        torch.load(folder / f"{case.name}.{rank}.pt", weights_only=False)
        for rank in range(case.config.num_ranks)
    ]
    for rank in ranks:
        assert (rank["labels"], rank["bytes"]) == (exact["labels"], exact["bytes"])
        for name in ("losses", "norm"):
            check_error(f"{case.name}: {name}", rank[name], eager[name], exact[name])
    for kind in ("gradients", "weights"):
        for name, whole in exact[kind].items():
            found = joined(case, ranks, kind, name, whole)
            check_error(f"{case.name}: {kind} {name}", found, eager[kind][name], whole)


@pytest.mark.parametrize("case", BY_RANKS[2], ids=lambda case: case.name)
def test_two_ranks_take_the_step_of_one_process(case: Case, two: Path) -> None:
    agrees_with_one_process(case, two)


@pytest.mark.slow
@pytest.mark.parametrize("case", BY_RANKS[4], ids=lambda case: case.name)
def test_four_ranks_take_the_step_of_one_process(case: Case, four: Path) -> None:
    agrees_with_one_process(case, four)


def test_experts_drop_tokens_in_these_cases() -> None:
    dropping = [case for case in CASES if (case.model.get("moe") or {}).get("capacity_factor")]
    assert len(dropping) >= 4
    for case in dropping:
        assert one_process(case, torch.float64)["losses"][3] > 0
