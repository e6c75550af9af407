"""The fused kernels' tests, run on a CPU under Triton's interpreter."""

from pathlib import Path

from triton_interpreter import check_interpreted


def test_fusions_under_the_interpreter() -> None:
    check_interpreted(Path(__file__).parent / "fusions")
