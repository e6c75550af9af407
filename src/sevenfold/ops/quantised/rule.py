"""Which way a product with an 8-bit weight goes on a GPU: by its number of rows alone.

    up to 64 rows     few      the time is that of the weight's bytes, which are read once
    up to 512         tile     tiles of 128 rows; the weight is widened in registers
    beyond            scratch  the weight is widened into memory, and PyTorch's product reads it

Widening N K codes into 16 bits moves 3 N K bytes, while a product of M rows takes 2 M N K FLOPs:
with 4.27 TB/s and 690 TFLOP/s (an H200) as much as 242 rows take. A tile that widens in registers
loses perhaps two fifths of the product's rate, so the scratch pays from some 600 rows on.
"""

from typing import Literal, NamedTuple

import torch

from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.tuning import best_config

Path = Literal["few", "tile", "scratch"]

FEW_ROWS = 64
TILE_ROWS = 512
_TILE = 128  # rows of a tile beyond FEW_ROWS
_LEAST_TILE = 16  # what a tensor core takes
_NARROW_COLUMNS = 4096  # up to which one program for 32 columns leaves multiprocessors idle


class Tile(NamedTuple):
    """One program's tile: BN weight rows, BM rows, and BK codes of each of WK parts of K."""

    BN: int
    BM: int
    BK: int
    WK: int
    num_warps: int
    num_stages: int


def product_path(rows: int) -> Path:
    """Return the way of a product of so many rows; of experts, by the mean of their rows."""
    if rows <= FEW_ROWS:
        return "few"
    return "tile" if rows <= TILE_ROWS else "scratch"


def tile_rows(rows: int) -> int:
    """Return the rows of a tile: the least of 16, 32 and 64 that holds them, else 128."""
    return max(_LEAST_TILE, next_power_of_2(max(1, rows))) if rows <= FEW_ROWS else _TILE


def linear_tile(rows: int, columns: int, device: torch.device) -> Tile:
    """Return the tile of a linear layer of M rows and N output channels."""
    width = "narrow" if columns <= _NARROW_COLUMNS else "wide"
    return _tile("quantised_linear", f"{tile_rows(rows)} rows {width}", tile_rows(rows), device)


def expert_tiles(rows: int, experts: int, device: torch.device) -> tuple[Tile, Tile]:
    """Return the tiles of a mixture's two products, of R rows over E experts.

    A tile holds twice an expert's even share, so that most experts need one.
    """
    even = tile_rows(cdiv(2 * rows, experts))
    kernels = ("quantised_gate_up", "quantised_down")
    first, second = (_tile(kernel, f"{even} rows", even, device) for kernel in kernels)
    return first, second


def _tile(kernel: str, key: str, rows: int, device: torch.device) -> Tile:
    # The interpreter takes the defaults on purpose, without the warning of an unknown GPU.
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "default"
    return Tile(BM=rows, **best_config(kernel, key, name))
