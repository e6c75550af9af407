"""Arrays of integers that go to a device together: one buffer there, one on the host."""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor


class Staging:
    """One int64 buffer on the device and a pinned one on the host, each cut into arrays.

    views: the arrays on the device.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        """Allocate them, zeroed, for arrays of these shapes."""
        self._shapes = list(shapes)
        size, pinned = sum(map(prod, shapes)), device.type == "cuda"
        with torch.inference_mode(False):  # sent outside of it, too
            self._staged = torch.zeros(size, dtype=torch.int64, pin_memory=pinned)
            self._device = torch.zeros(size, dtype=torch.int64, device=device)
        self.views = self._cut(self._device)
        self._host = [x.numpy() for x in self._cut(self._staged)]
        self._copied = torch.cuda.Event() if pinned else None

    def begin(self) -> list[np.ndarray]:
        """Return the arrays on the host, to be written now."""
        if self._copied is not None:
            self._copied.synchronize()  # what read it before, most often long since done
        return self._host

    def send(self) -> None:
        """Copy what was written to the device; nothing waits for the copy."""
        self.copy()
        self.note_copied()

    def copy(self) -> None:
        """Copy what is written when this runs to the device, as a recording may do."""
        self._device.copy_(self._staged, non_blocking=True)

    def note_copied(self) -> None:
        """Let the next `begin` wait for what runs now, a copy among it."""
        if self._copied is not None:
            self._copied.record()

    def _cut(self, whole: Tensor) -> list[Tensor]:
        parts = whole.split([prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
