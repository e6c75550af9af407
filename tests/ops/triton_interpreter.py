"""Runs files of tests under Triton's interpreter, so that kernels are tested without a GPU.

Triton reads TRITON_INTERPRET when it is imported, so such tests need a process of their own: this
file, run as a script. Its name does not begin with `test_`: what it runs is collected only when it
is named.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def check_interpreted(*tests: Path) -> None:
    """Raise AssertionError, with pytest's report, unless every test of the files passes."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, tests)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def main(tests: list[str]) -> int:
    """Run the tests in this process, and return the exit code."""
    # It imports Triton, which whoever calls check_interpreted does without.
    from interpreter_types import keep_types

    keep_types()
    return pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *tests])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
