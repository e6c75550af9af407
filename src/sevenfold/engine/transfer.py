"""Numbers to the device and back without the host waiting for more than it must.

An ordinary copy to a GPU waits for all work before it; one from pinned memory does not.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


def upload(numbers: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Return integers as an int64 tensor on the device; nothing waits for the copy."""
    return _sent(torch.from_numpy(np.asarray(numbers, dtype=np.int64)), device)


def send(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor of a dtype on the device; nothing waits for the copy."""
    return _sent(torch.tensor(values, dtype=dtype), device)


def _sent(host: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return host.to(device)
    pinned = torch.empty_like(host, pin_memory=True)
    # By NumPy: PyTorch copies 32,768 numbers by all threads, which took 6 to 10 ms.
    pinned.numpy()[...] = host.numpy()
    return pinned.to(device, non_blocking=True)


def upload_parts(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Return several rows of integers on the device, sent there in one copy.

    Each begins on a border of 16 bytes: Triton compiles a kernel apart for addresses that do not.
    """
    rooms = [len(part) + len(part) % 2 for part in parts]
    whole = np.zeros(sum(rooms), np.int64)
    for start, part in zip(accumulate(rooms, initial=0), parts, strict=False):
        whole[start : start + len(part)] = part
    sent = upload(whole, device).split(rooms)
    return [x[: len(part)] for x, part in zip(sent, parts, strict=True)]


class Arriving:
    """Columns of integers on their way to the host."""

    def __init__(self, rows: Tensor) -> None:
        """Begin the copy of rows [N, columns] int64, contiguous.

        Nothing waits for it, and the tensor may change from now on.
        """
        on_gpu = rows.device.type == "cuda"
        host = torch.empty(rows.shape, dtype=torch.int64, pin_memory=on_gpu)
        host.copy_(rows, non_blocking=True)
        self._columns = host.numpy().T  # now, and not while a token is waited for
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record()

    def numbers(self) -> list[list[int]]:
        """Wait for the copy, and for no work that came after it; returns the columns."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._columns.tolist()


def side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Return equally long integer or bool tensors [N] as columns of one, [N, columns] int64."""
    return torch.stack([x.to(torch.int64) for x in columns], dim=1)
