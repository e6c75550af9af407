"""How products of a few rows are cut into programs on a GPU; imports no Triton.

A weight's bytes are all the time there is: programs own few output channels, so that every
multiprocessor streams, and their rows are padded to what a tensor core takes, but for one alone.

    rows          1 | 16 | 32 | 64 | 128, the least that holds them, and 128 in 16 bits only; of
                  experts, twice their mean, 16 at least
    narrow        up to 4,096 output channels: 16 of them to a program fill an H100 or H200
    wide, vast    up to 16,384, and a head's vocabulary

Every program of a tile reads all its rows: those of 128 rows, where programs are few, share the
rows too.
"""

from typing import NamedTuple

import torch

from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.tuning import best_config

# More rows than these are the libraries' products; those of fp32 are bound by arithmetic.
_FEW_ROWS, _FEW_ROWS_OF_FP32 = 128, 64
_LEAST_TILE = 16
_NARROW_COLUMNS, _WIDE_COLUMNS = 4096, 16384
_SMALL_BYTES = 2


class Tile(NamedTuple):
    """One program's tile: BN weight rows, BM rows, and BK numbers of each of WK parts of K.

    WK is 1 where BM is. More rows than BM are other programs', or of an expert further rounds.
    """

    BN: int
    BM: int
    BK: int
    WK: int
    num_warps: int
    num_stages: int


def few_rows(x: torch.Tensor) -> int:
    """Return how many rows of x's dtype are few."""
    return _FEW_ROWS if x.element_size() == _SMALL_BYTES else _FEW_ROWS_OF_FP32


def tile_rows(rows: int, weight: torch.Tensor) -> int:
    """Return the key of a tile: the least of 1, 16, 32, 64 and 128 rows that holds them, if any."""
    return 1 if rows <= 1 else _padded_rows(rows, weight)


def _padded_rows(rows: int, weight: torch.Tensor) -> int:
    return min(few_rows(weight), max(_LEAST_TILE, next_power_of_2(max(1, rows))))


def linear_tile(rows: int, weight: torch.Tensor, columns: int) -> Tile:
    """Return the tile of a product of M rows with weights of N output channels in all."""
    width = "wide" if columns <= _WIDE_COLUMNS else "vast"
    if columns <= _NARROW_COLUMNS:
        width = "narrow"
    held = tile_rows(rows, weight)
    return _tile("few_rows_linear", f"{held} rows {width}", held, weight)


def gate_up_tile(rows: int, weight: torch.Tensor) -> Tile:
    """Return the tile of a SwiGLU's first product, of M rows in all over weight's E experts."""
    even = _even_rows(rows, weight)
    return _tile("few_rows_gate_up", f"{even} rows", even, weight)


def down_tile(rows: int, weight: torch.Tensor) -> Tile:
    """Return the tile of the experts' second product, of M rows in all over weight's E experts."""
    even = _even_rows(rows, weight)
    return _tile("few_rows_down", f"{even} rows", even, weight)


def alone_tiles(gate_up: torch.Tensor, down: torch.Tensor) -> tuple[Tile, Tile]:
    """Return the tiles of both products where one or two tokens have experts of their own."""
    first = _tile("few_rows_gate_up", "alone", 1, gate_up)
    return first, _tile("few_rows_down", "alone", 1, down)


def _even_rows(rows: int, weight: torch.Tensor) -> int:
    # Twice an even share, so that most experts need one tile.
    experts = len(weight)
    return _padded_rows(rows if experts == 1 else cdiv(2 * rows, experts), weight)


def _tile(kernel: str, key: str, rows: int, weight: torch.Tensor) -> Tile:
    bits = 16 if weight.element_size() == _SMALL_BYTES else 32
    # The interpreter takes the defaults on purpose, without the warning of an unknown GPU.
    on_gpu = weight.device.type == "cuda"
    name = torch.cuda.get_device_name(weight.device) if on_gpu else "default"
    return Tile(**({"BM": rows} | best_config(kernel, f"{bits} bits {key}", name)))
