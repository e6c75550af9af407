"""The kernels for fewer bits, run on a CPU under Triton's interpreter."""

from pathlib import Path

from triton_interpreter import check_interpreted

OPS = Path(__file__).parent


def test_kernels_for_fewer_bits_under_the_interpreter() -> None:
    check_interpreted(
        OPS / "quantised" / "test_quantised_kernels.py",
        OPS / "low_precision" / "test_state_kernels.py",
        OPS / "lightning" / "test_encoded_kernels.py",
    )
