"""From the first rank to all others: messages of integers over the host's network, and tokens."""

from datetime import timedelta

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

_FIRST_NUMBERS = 1024  # of a message, that travel with its length
_PATIENCE = timedelta(days=365)  # ranks that serve wait for requests, however long none comes


class Channel:
    """Broadcasts over gloo, in the host's memory, so that no message waits for a GPU.

    Tokens that are on a device go from device to device, so that the host does not wait for them.
    """

    def __init__(self, devices: dist.ProcessGroup | None = None) -> None:
        """Open it; every rank of the default group calls this.

        Args:
            devices: over which the ranks' devices speak; None takes the default group.
        """
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._devices = devices

    @property
    def is_first(self) -> bool:
        """Whether this rank sends."""
        return dist.get_rank() == 0

    def send(self, message: np.ndarray) -> None:
        """Send int64 numbers to all other ranks."""
        head = np.zeros(1 + _FIRST_NUMBERS, dtype=np.int64)
        head[0] = len(message)
        head[1 : 1 + len(message)] = message[:_FIRST_NUMBERS]
        self._broadcast(head)
        if len(message) > _FIRST_NUMBERS:
            self._broadcast(np.ascontiguousarray(message[_FIRST_NUMBERS:]))

    def receive(self) -> np.ndarray:
        """Return the next message."""
        head = self._broadcast(np.zeros(1 + _FIRST_NUMBERS, dtype=np.int64))
        first = head[1 : 1 + min(int(head[0]), _FIRST_NUMBERS)]
        missing = int(head[0]) - len(first)
        if not missing:
            return first
        return np.concatenate([first, self._broadcast(np.zeros(missing, dtype=np.int64))])

    def send_text(self, text: str) -> None:
        """Send a text."""
        self.send(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))

    def receive_text(self) -> str:
        """Return the next message, which must be a text."""
        return self.receive().astype(np.uint8).tobytes().decode()

    def share(self, numbers: Tensor) -> None:
        """Fill int64 numbers, contiguous on each rank's device, with the first rank's."""
        dist.broadcast(numbers, 0, self._devices)

    def _broadcast(self, numbers: np.ndarray) -> np.ndarray:
        group = self._group
        dist.broadcast(torch.from_numpy(numbers), 0, group)  # pyright: ignore[reportArgumentType]
        return numbers
