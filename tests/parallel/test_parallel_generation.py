"""Tensor parallelism generates what one process generates, by the decoder and by the engine."""

from pathlib import Path

import pytest
import torch
from parallel_generation import by_decoder, generate, model_of, serve
from parallel_helpers import run_ranks


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_decode_the_greedy_tokens_of_one_process(num_ranks: int, tmp_path: Path) -> None:
    run_ranks("decoding", num_ranks, tmp_path, "lf")
    alone = by_decoder(model_of("lf", True), 3)
    for rank in range(num_ranks):
        assert torch.load(tmp_path / f"lf.{rank}.pt", weights_only=True) == alone


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "layers"), [(2, "lfs"), (4, "llf")])
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


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_serve_the_greedy_tokens_of_one_process(num_ranks: int, tmp_path: Path) -> None:
    """The first schedules, the others follow; prefix cache, chains and trees of drafts."""
    run_ranks("serving", num_ranks, tmp_path, "lfs")
    for experts in (False, True):
        alone = serve(model_of("lfs", experts))
        assert alone[0] == alone[1] == alone[2]
        assert torch.load(tmp_path / f"lfs-{experts}.pt", weights_only=True) == alone
