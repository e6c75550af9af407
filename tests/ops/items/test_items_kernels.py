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
    for places in ([0, 0, 0, 0], [item, 3 * item, 0, 5 * item], [item, item, 2 * item, 0]):
        words, at = torch.arange(1, 6 * item + 1).to(DEVICE), torch.tensor(places).to(DEVICE)
        wanted = words.clone()
        eager.copy_and_clear(wanted, at, copied, min(cleared, item))
        triton_items.copy_and_clear(words, at, copied, cleared)
        assert torch.equal(words, wanted)


def test_nothing_may_be_asked_for() -> None:
    words = torch.arange(40).to(DEVICE)
    triton_items.copy_and_clear(words, torch.tensor([3, 9]).to(DEVICE), 0, 8)
    assert torch.equal(words, torch.arange(40).to(DEVICE))


@pytest.mark.gpu
def test_the_operator_takes_them_on_a_gpu() -> None:
    words = torch.arange(40, device="cuda")
    places = torch.tensor([30, 5, 12, 0], device="cuda")
    wanted = words.clone()
    eager.copy_and_clear(wanted, places, 4, 3)
    copy_and_clear(words, places, copied=4, cleared=3)
    assert torch.equal(words, wanted)
