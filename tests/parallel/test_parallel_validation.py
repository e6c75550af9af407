"""Losses by position and by length are those of one process, under every division."""

from pathlib import Path

import pytest
import torch
from parallel_helpers import run_ranks
from parallel_validation import CASES, validated

from sevenfold.ops.testing import check_error
from sevenfold.parallel import Layout, ParallelConfig

ALONE = Layout(ParallelConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("validation")
    run_ranks("validation", 2, made)
    return made


@pytest.fixture(scope="module")
def one_process() -> list:
    """Exact, and in fp32; the model is the same in all cases."""
    return [validated(CASES[0], ALONE, dtype) for dtype in (torch.float64, torch.float32)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_by_bucket_are_those_of_one_process(case, folder: Path, one_process: list) -> None:
    exact, eager = one_process
    assert list(exact.by_position) == list(exact.by_length) == [0, 256, 512]
    for rank in range(2):
        found = torch.load(folder / f"{case.name}.{rank}.pt", weights_only=False)
        for kind in ("by_position", "by_length"):
            three = [getattr(result, kind) for result in (found, eager, exact)]
            assert list(three[0]) == list(three[2])
            ours, theirs, truth = (
                torch.tensor(list(x.values()), dtype=torch.float64) for x in three
            )
            check_error(kind, ours, theirs.float(), truth)
        for kind in ("loss", "bits_per_byte"):
            three = (torch.tensor(getattr(x, kind)) for x in (found, eager, exact))
            ours, theirs, truth = three
            check_error(kind, ours, theirs, truth.double())
