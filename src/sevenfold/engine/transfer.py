"""Numbers to the device and back without the host waiting for more than it must.

An ordinary copy to a GPU waits for all work before it; one from pinned memory does not.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(numbers: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Return integers as an int64 tensor on the device; nothing waits for the copy."""
    host = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def send(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor of a dtype on the device; nothing waits for the copy."""
    host = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def upload_parts(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Return several rows of integers on the device, sent there in one copy."""
    whole = upload(np.concatenate(parts), device)
    return list(whole.split([len(part) for part in parts]))


class Arriving:
    """Numbers of equally long integer or bool tensors on their way to the host, in one copy."""

    def __init__(self, columns: Sequence[Tensor]) -> None:
        """Begin the copy; nothing waits for it, and the tensors may change from now on."""
        self._host, self._arrived = torch.stack([x.to(torch.int64) for x in columns]), None
        if self._host.device.type == "cuda":
            packed, shape = self._host, self._host.shape
            self._host = torch.empty(shape, dtype=torch.int64, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def numbers(self) -> list[list[int]]:
        """Wait for the copy, and for no work that came after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


def fetch(columns: Sequence[Tensor]) -> list[list[int]]:
    """Return the numbers of equally long integer or bool tensors, by one copy and one wait."""
    return Arriving(columns).numbers()
