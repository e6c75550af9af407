"""How fast a run is, and how much of its device it uses."""

import resource
import sys
from dataclasses import dataclass, field

import torch

from sevenfold.models import ModelConfig
from sevenfold.models.accounting import training_flops

# Part of torch.cuda.get_device_name -> dense bf16 FLOP/s with fp32 accumulation, by NVIDIA's data
# sheets; of the SXM form where there are several.
_BF16_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


@dataclass(frozen=True)
class FlopsCounter:
    """Counts the model FLOPs of steps; each length is counted once and remembered."""

    config: ModelConfig
    _by_length: dict[int, int] = field(default_factory=dict)

    def count(self, lengths: tuple[int, ...]) -> int:
        """Return the FLOPs of a step whose documents have these lengths."""
        return sum(self._one(length) for length in lengths)

    def _one(self, length: int) -> int:
        if length not in self._by_length:
            self._by_length[length] = training_flops(self.config, (length,))
        return self._by_length[length]


def known_peak_flops(device: torch.device, autocast: str | None) -> float | None:
    """Return a GPU's dense bf16 peak in FLOP/s; None in fp32, on a CPU and on other GPUs."""
    if device.type != "cuda" or autocast is None:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _BF16_PEAK_FLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most bytes that the allocator of a GPU has held, or on a CPU the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
