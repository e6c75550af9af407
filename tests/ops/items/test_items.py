"""One item copied and others cleared, as numbers say: checks, and plain PyTorch."""

import pytest
import torch

from sevenfold import ops
from sevenfold.config import UnsupportedError


def test_one_item_is_copied_and_some_are_cleared() -> None:
    words, copied = torch.arange(40), torch.full((4,), 7)
    ops.copy_and_clear(words, copied, torch.tensor([30, 12, 0, 20]), cleared=3)
    wanted = torch.arange(40)
    assert torch.equal(copied, wanted[30:34])
    wanted[12:15], wanted[20:23] = 0, 0
    assert torch.equal(words, wanted)


def test_the_first_item_is_copied_and_never_cleared() -> None:
    words, copied = torch.arange(40), torch.full((4,), 7)
    ops.copy_and_clear(words, copied, torch.zeros(4, dtype=torch.int64), cleared=3)
    assert torch.equal(words, torch.arange(40))
    assert torch.equal(copied, torch.arange(4))


def test_shapes_dtypes_and_devices_are_checked() -> None:
    words, copied, places = torch.arange(40), torch.arange(4), torch.tensor([1, 1])
    message = r"shapes \[W\], \[C\] and \[1 \+ N\], got \[40\], \[4\], \[0\]"
    with pytest.raises(ValueError, match=message):
        ops.copy_and_clear(words, copied, places[:0], cleared=1)
    with pytest.raises(ValueError, match=r"got \[1, 40\], \[4\], \[2\]"):
        ops.copy_and_clear(words[None], copied, places, cleared=1)
    with pytest.raises(TypeError, match=r"places must be torch\.int64, got torch\.int32"):
        ops.copy_and_clear(words, copied, places.int(), cleared=1)
    with pytest.raises(TypeError, match=r"copied must be torch\.int64, got torch\.float32"):
        ops.copy_and_clear(words, copied.float(), places, cleared=1)
    with pytest.raises(UnsupportedError, match="on a GPU for impl triton"):
        ops.copy_and_clear(words, copied, places, impl="triton", cleared=1)
    with pytest.raises(UnsupportedError, match="copy_and_clear must use impl eager, triton"):
        ops.copy_and_clear(words, copied, places, impl="numba", cleared=1)
