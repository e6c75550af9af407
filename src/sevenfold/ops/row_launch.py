"""How kernels that work row by row are cut into programs; imports no Triton."""

from typing import NamedTuple

import torch
from torch import Tensor

# Elements that one program holds at once, and how many of them one warp takes.
_TILE_ELEMENTS = 4096
_WARP_ELEMENTS = 1024
_MAX_WARPS = 16
# Programs that share one multiprocessor where each of them takes many rows.
_PROGRAMS_PER_SM = 4


class RowTile(NamedTuple):
    """Rows of one program, columns rounded up to a power of two, and warps."""

    rows: int
    columns: int
    warps: int


def row_tile(width: int) -> RowTile:
    """Return the tile of a kernel that holds whole rows of the given width."""
    columns = next_power_of_2(width)
    rows = max(1, _TILE_ELEMENTS // columns)
    return RowTile(rows, columns, min(_MAX_WARPS, max(1, rows * columns // _WARP_ELEMENTS)))


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least n; n >= 1."""
    return 1 << (n - 1).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """View x [..., D] as [R, D] whose last stride is 1, copying only where it must."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def num_programs(device: torch.device, blocks: int) -> int:
    """Return how many programs share the given number of blocks of rows, at least one.

    It depends on the device alone, so that partial sums add up in one order on one device.
    """
    sms = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu(device) else 1
    return max(1, min(blocks, _PROGRAMS_PER_SM * sms))


def is_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU; a CPU means Triton's interpreter, in tests."""
    return device.type == "cuda"
