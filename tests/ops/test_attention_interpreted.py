"""The tests of kernels of softmax attention, run on a CPU under Triton's interpreter."""

from pathlib import Path

from triton_interpreter import check_interpreted


def test_attention_kernels_under_the_interpreter() -> None:
    folder = Path(__file__).parent / "attention"
    check_interpreted(folder / "test_pages_kernels.py", folder / "test_join_kernels.py")
