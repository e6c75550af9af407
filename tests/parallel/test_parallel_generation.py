"""Tensor parallelism generates what one process generates, by the decoder and by the engine."""

from pathlib import Path

import pytest
import torch
from parallel_generation import generate, model_of
from parallel_helpers import run_ranks


@pytest.mark.parametrize(
    ("num_ranks", "layers"),
    [(2, "lfs"), pytest.param(4, "llf", marks=pytest.mark.slow)],
)
def test_ranks_generate_the_greedy_tokens_of_one_process(
    num_ranks: int, layers: str, tmp_path: Path
) -> None:
    run_ranks("generation", num_ranks, tmp_path, layers)
    for experts in (False, True):
        alone = generate(model_of(layers, experts))
        assert alone["decoder"] == alone["engine"] == alone["uncached"]
        for rank in range(num_ranks):
            found = torch.load(tmp_path / f"{layers}-{experts}.{rank}.pt", weights_only=True)
            assert found == alone
