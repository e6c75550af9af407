"""Ranks that have no row for others, or from none, still meet in every exchange, both ways."""

from pathlib import Path

import pytest
import torch
from parallel_choices import CASES, Choices, Result, result_of
from parallel_helpers import run_ranks

from sevenfold.ops.testing import check_error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choices")
    for num_ranks in (2, 4):
        run_ranks("choosing", num_ranks, folder)
    return folder


def of_one_process(choices: Choices, dtype: torch.dtype) -> Result:
    tokens, weights, experts, dy = choices.inputs()
    layer = choices.mixture().to(dtype)
    return result_of(layer, tokens.to(dtype), weights.to(dtype), experts, dy.to(dtype))


@pytest.mark.parametrize("choices", CASES, ids=lambda choices: choices.name)
def test_ranks_give_what_one_process_gives(choices: Choices, folder: Path) -> None:
    exact, eager = (of_one_process(choices, dtype) for dtype in (torch.float64, torch.float32))
    ranks = [
        torch.load(folder / f"{choices.name}.{rank}.pt", weights_only=False)
        for rank in range(choices.num_ranks)
    ]
    # In the order of the ranks lie tokens as well as experts.
    for name, parts, *known in zip(
        Result._fields, zip(*ranks, strict=True), eager, exact, strict=True
    ):
        check_error(f"{choices.name}: {name}", torch.cat(parts), *known)
    dropped = (exact.dweights == 0).sum()
    assert bool(dropped) == choices.drops
