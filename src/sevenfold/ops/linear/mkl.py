"""Where MKL, which torch.nn.functional.linear calls, is the fastest product in fp32 on a CPU.

MKL takes its AVX-512 path on processors by Intel alone. Measured on 2 cores of a Xeon (family 6
model 207), GFLOP/s: forward of 1,024 x 256 x 768 by MKL 225, by oneDNN 201, by register tiles 169;
gradient of the weight of 4,096 x 256 x 768 by MKL 219, by tiles 153. On AMD's Zen 4 and 5 MKL
takes its AVX2 path and comes last.
"""

import platform
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


def _by_intel() -> bool:
    names = _CPUINFO.read_text() if _CPUINFO.exists() else platform.processor()
    return "GenuineIntel" in names


FASTEST = torch.backends.mkl.is_available() and _by_intel()
