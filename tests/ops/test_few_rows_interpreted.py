"""The kernels for half a layer of a few rows, run on a CPU under Triton's interpreter."""

from pathlib import Path

from triton_interpreter import check_interpreted

TESTS = Path(__file__).parents[1]


def test_half_layers_under_the_interpreter() -> None:
    check_interpreted(
        TESTS / "ops" / "few_rows" / "test_device_rows.py",
        TESTS / "models" / "test_stepping_device.py",
    )
