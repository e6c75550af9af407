"""The tests of kernels of softmax attention, run on a CPU under Triton's interpreter."""

from pathlib import Path

from triton_interpreter import check_interpreted


def test_attention_kernels_under_the_interpreter() -> None:
    folder = Path(__file__).parent / "attention"
    names = ("test_pages_kernels.py", "test_join_kernels.py", "test_chunks_kernels.py")
    check_interpreted(*(folder / name for name in names))
