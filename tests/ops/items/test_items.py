"""One item copied and others cleared, as numbers say: checks, and plain PyTorch."""

import pytest
import torch

from sevenfold import ops
from sevenfold.config import UnsupportedError


def test_one_item_is_copied_and_some_are_cleared() -> None:
    words = torch.arange(40)
    ops.copy_and_clear(words, torch.tensor([30, 5, 12, 0, 20]), copied=4, cleared=3)
    wanted = torch.arange(40)
    wanted[5:9], wanted[12:15], wanted[20:23] = wanted[30:34].clone(), 0, 0
    assert torch.equal(words, wanted)


def test_the_same_place_and_the_first_change_nothing() -> None:
    words = torch.arange(40)
    ops.copy_and_clear(words, torch.zeros(4, dtype=torch.int64), copied=4, cleared=3)
    assert torch.equal(words, torch.arange(40))


def test_shapes_dtypes_and_devices_are_checked() -> None:
    words, places, size = torch.arange(40), torch.tensor([1, 1]), {"copied": 1, "cleared": 1}
    with pytest.raises(ValueError, match=r"shapes \[W\] and \[2 \+ N\], got \[40\] and \[1\]"):
        ops.copy_and_clear(words, places[:1], **size)
    with pytest.raises(ValueError, match=r"got \[1, 40\] and \[2\]"):
        ops.copy_and_clear(words[None], places, **size)
    with pytest.raises(TypeError, match=r"places must be torch\.int64, got torch\.int32"):
        ops.copy_and_clear(words, places.int(), **size)
    with pytest.raises(UnsupportedError, match="on a GPU for impl triton"):
        ops.copy_and_clear(words, places, impl="triton", **size)
    with pytest.raises(UnsupportedError, match="copy_and_clear must use impl eager, triton"):
        ops.copy_and_clear(words, places, impl="numba", **size)
