"""How tests of Triton kernels run: on a GPU, or on a CPU under Triton's interpreter.

A module of kernel tests sets `pytestmark = GPU_UNLESS_INTERPRETED` and takes its device from DEVICE
and its dtypes from DTYPES. Alone it needs a GPU; run_interpreted runs it in a process of its own,
for Triton reads the variable when it is imported.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU_UNLESS_INTERPRETED = () if INTERPRETED else pytest.mark.gpu
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# The interpreter's bf16 is broken.
LOW_DTYPES = (torch.float16,) if INTERPRETED else (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *LOW_DTYPES)


def run_interpreted(modules: Sequence[Path], *options: str) -> None:
    """Run the tests of some modules under the interpreter; raise AssertionError if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", *options]
    done = subprocess.run(
        [*command, *map(str, modules)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
