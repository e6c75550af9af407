"""Tiles of a few rows by the defaults: all have one; those of few channels share the rows."""

import pytest
import torch

from sevenfold.ops.few_rows import tiles
from sevenfold.ops.few_rows.tiles import Tile

MOST = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}


@pytest.mark.parametrize("dtype", MOST)
def test_all_few_rows_have_tiles(dtype: torch.dtype) -> None:
    weight, possible = torch.empty(1, 1, dtype=dtype), range(1, MOST[dtype] + 1)
    assert tiles.few_rows(weight) == MOST[dtype]
    for rows in possible:
        found = [tiles.linear_tile(rows, weight, columns) for columns in (4096, 16_384, 16_385)]
        assert all(_rows(tile) in possible for tile in found)
        for E in (1, 2, 64):
            for tile_of in (tiles.gate_up_tile, tiles.down_tile):
                assert _rows(tile_of(8 * rows, weight.expand(E, 1))) in possible


def test_a_tile_is_the_least_that_holds_the_rows() -> None:
    weight = torch.empty(1, 1, dtype=torch.bfloat16)
    held = [tiles.tile_rows(rows, weight) for rows in (0, 1, 2, 16, 17, 33, 64, 65, 128, 129)]
    assert held == [1, 1, 16, 16, 32, 64, 64, 128, 128, 128]
    assert tiles.tile_rows(65, weight.float()) == 64
    # 128 tokens by two of eight experts: 32 each, in a tile for twice as many.
    assert _rows(tiles.gate_up_tile(256, weight.expand(8, 1))) == 64


def test_programs_of_few_channels_share_many_rows() -> None:
    weight = torch.empty(1, 1, dtype=torch.bfloat16)
    assert _rows(tiles.linear_tile(128, weight, 2048)) < _rows(tiles.linear_tile(128, weight, 8192))


@pytest.mark.parametrize("dtype", MOST)
def test_tiles_by_default_fit_into_the_least_shared_memory(dtype: torch.dtype) -> None:
    """Of capability 8.6, 8.9 and 12: what all stages but one hold, of weights and of rows."""
    weight, possible = torch.empty(1, 1, dtype=dtype), range(2, MOST[dtype] + 1)
    for rows in possible:
        found = [tiles.linear_tile(rows, weight, columns) for columns in (4096, 16_384, 16_385)]
        found += [tile_of(rows, weight) for tile_of in (tiles.gate_up_tile, tiles.down_tile)]
        for tile in found:
            stage = (tile.BN + tile.BM) * tile.BK * tile.WK * weight.element_size()
            assert stage * (tile.num_stages - 1) <= 99 << 10, tile


def _rows(tile: Tile) -> int:
    return tile.BM
