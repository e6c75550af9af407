"""Tensor parallelism generates what one process generates, by the decoder and by the engine."""

from pathlib import Path

import pytest
import torch
from parallel_generation import by_decoder, generate, model_of, serve
from parallel_helpers import run_ranks
from parallel_recorded import serve_recorded


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


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_record_the_same_and_serve_by_what_they_recorded(
    num_ranks: int, tmp_path: Path
) -> None:
    """Steps ahead among them, whose tokens go from device to device or are each rank's own."""
    run_ranks("recorded", num_ranks, tmp_path, "lfs")
    for experts in (False, True):
        ranks = [
            torch.load(tmp_path / f"lfs-{experts}.{rank}.pt", weights_only=True)
            for rank in range(num_ranks)
        ]
        alone = serve_recorded(model_of("lfs", experts), None, records=False)
        for n, first in enumerate(ranks[0]):
            assert first["tokens"] == alone[n]["tokens"]
            assert first["recorded"]
            assert all(rank[n]["recorded"] == first["recorded"] for rank in ranks)
            assert all(rank[n]["replayed"] == first["replayed"] for rank in ranks)
        assert {"steps", "prefills"} <= {kind for kind, *_ in ranks[0][0]["recorded"]}
        assert "drafts" in {kind for kind, *_ in ranks[0][1]["recorded"]}
        ahead = ranks[0][0]["ahead"]
        assert ahead["steps"] > ahead["shared"] > 0
        assert ahead["steps"] > ahead["told rows"] > 0
