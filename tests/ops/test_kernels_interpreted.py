"""The kernels' tests, run on a CPU under Triton's interpreter."""

from pathlib import Path

import pytest
from triton_interpreter import check_interpreted

TESTS = Path(__file__).parents[1]
# Two processes and no more, because each takes seconds to start; of like length, for two workers.
GROUPS = {
    "mixers": [
        "ops/attention/test_chunks_kernels.py",
        "ops/attention/test_join_kernels.py",
        "ops/attention/test_pages_kernels.py",
        "ops/lightning/test_decode_kernels.py",
        "ops/lightning/test_encoded_kernels.py",
        "ops/lightning/test_triton_borders.py",
        "ops/lightning/test_triton_padded.py",
        "ops/lightning/test_triton_scan.py",
        "ops/low_precision/test_state_kernels.py",
    ],
    "layers": [
        "ops/few_rows/test_device_rows.py",
        "ops/items/test_items_kernels.py",
        "models/test_stepping_device.py",
        "models/test_stepping_parts.py",
        "ops/fusions",
        "ops/quantised/test_quantised_kernels.py",
    ],
}


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_under_the_interpreter(group: str) -> None:
    check_interpreted(*(TESTS / name for name in GROUPS[group]))


def test_every_test_of_kernels_is_in_a_group() -> None:
    named = {TESTS / name for names in GROUPS.values() for name in names}
    for path in TESTS.rglob("test_*.py"):
        if "from kernel_device import" in path.read_text(encoding="utf-8") and path != Path(
            __file__
        ):
            assert named & {path, path.parent}, path
