"""Items copied and cleared by the kernel, on a GPU or under Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE, GPU_UNLESS_INTERPRETED

from sevenfold.ops.items import copy_and_clear, eager, triton_items

pytestmark = GPU_UNLESS_INTERPRETED
BLOCK = triton_items._BLOCK


@pytest.mark.parametrize("copied", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("cleared", [0, 7, BLOCK, BLOCK + 1])
def test_what_the_numbers_say_and_nothing_else(copied: int, cleared: int) -> None:
    item = 3 * BLOCK
    for places in ([0, 0, 0], [item, 0, 5 * item], [3 * item, 2 * item, item]):
        words, at = torch.arange(1, 6 * item + 1).to(DEVICE), torch.tensor(places).to(DEVICE)
        wanted, found = (torch.full((copied,), 7).to(DEVICE) for _ in range(2))
        left = words.clone()
        eager.copy_and_clear(left, wanted, at, min(cleared, item))
        triton_items.copy_and_clear(words, found, at, cleared)
        assert torch.equal(words, left)
        assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_the_operator_takes_them_on_a_gpu() -> None:
    words, copied = torch.arange(40, device="cuda"), torch.zeros(4, dtype=torch.int64).cuda()
    copy_and_clear(words, copied, torch.tensor([30, 12, 0], device="cuda"), cleared=3)
    assert copied.tolist() == [30, 31, 32, 33]
    assert words[10:17].tolist() == [10, 11, 0, 0, 0, 15, 16]
