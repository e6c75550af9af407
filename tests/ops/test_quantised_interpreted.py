"""The kernels for fewer bits, run on a CPU under Triton's interpreter."""

from pathlib import Path

from triton_interpreter import check_interpreted


def test_quantised_kernels_under_the_interpreter() -> None:
    check_interpreted(Path(__file__).parent / "quantised" / "test_quantised_kernels.py")


def test_state_kernels_under_the_interpreter() -> None:
    check_interpreted(Path(__file__).parent / "low_precision" / "test_state_kernels.py")


def test_encoded_decoding_under_the_interpreter() -> None:
    check_interpreted(Path(__file__).parent / "lightning" / "test_encoded_kernels.py")
