"""Launches that begin before the kernel in front of them has ended; imports no Triton.

A Hopper GPU can prepare a kernel's programs while the last ones of the kernel before still run
(programmatic dependent launch). Every program of such a kernel waits before it writes, and before
it reads anything but weights, which no kernel of a step writes: so whoever has waited for one
kernel has waited for all before it. None lets the next one begin sooner than its own end: programs
that only wait take the place of those that work, and fetching their weights takes the bandwidth
(docs/kernels-fusions.md).
"""

from functools import cache

import torch
from torch import Tensor

_LEAST_CAPABILITY = (9, 0)


def overlapping(x: Tensor) -> dict[str, bool]:
    """Return the options of a launch whose kernel takes OVERLAPS and waits by triton_overlap."""
    if x.is_cuda and _can_overlap(x.device):
        return {"OVERLAPS": True, "launch_pdl": True}
    return {"OVERLAPS": False}


@cache
def _can_overlap(device: torch.device) -> bool:
    is_nvidia = torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
