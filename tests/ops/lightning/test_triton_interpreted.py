"""The scan kernels without a GPU: their tests, tiny, under Triton's interpreter."""

from pathlib import Path

import pytest
from triton_interpreter import check_interpreted


def test_scans_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    names = ("test_triton_scan.py", "test_triton_padded.py")
    check_interpreted(*(Path(__file__).with_name(name) for name in names))
