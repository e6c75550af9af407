"""The tests of attention over pages, run on a CPU under Triton's interpreter."""

from pathlib import Path

from triton_interpreter import check_interpreted


def test_attention_kernels_under_the_interpreter() -> None:
    check_interpreted(Path(__file__).parent / "attention" / "test_pages_kernels.py")
