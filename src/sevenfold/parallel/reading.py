"""Numbers between the host and a device, without waiting for the work that lies before them."""

import torch
from torch import Tensor


class Reading:
    """Numbers on their way to the host, from where the device's work stands."""

    def __init__(self, x: Tensor) -> None:
        self.event, self.host = None, x
        if x.device.type == "cuda":
            self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self.host.copy_(x, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def numbers(self) -> Tensor:
        """Wait for them, and not for what the device was given since."""
        if self.event is not None:
            self.event.synchronize()
        return self.host


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy from the host; from pinned memory, or the copy would wait for all work before it."""
    if device.type != "cuda":
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)
