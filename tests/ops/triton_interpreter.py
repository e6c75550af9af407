"""Runs a file of tests under Triton's interpreter, so that kernels are tested without a GPU.

Triton reads TRITON_INTERPRET when it is imported, so such tests need a process of their own. The
file's name does not begin with `test_`: it is collected only when it is named here.
"""

import os
import subprocess
import sys
from pathlib import Path


def check_interpreted(*tests: Path) -> None:
    """Raise AssertionError, with pytest's report, unless every test of the files passes."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, tests)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
