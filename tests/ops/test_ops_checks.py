"""The shared checks: when they pass, and what they say when they do not."""

import re

import pytest
import torch

from sevenfold.config import UnsupportedError
from sevenfold.ops import Impl
from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl

KNOWN = (Impl.REFERENCE, Impl.EAGER)


def test_what_keeps_the_rules_passes() -> None:
    x = torch.zeros(2, 3)
    check_shape("x", x, (2, 3), "[A, B]")
    check_dtype("x", x, (torch.float32, torch.float64))
    check_device("x", x, torch.device("cpu"))
    assert x.eq(0).all()


def test_messages() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=re.escape("x must have shape [A] = [2], got [2, 3]")):
        check_shape("x", x, (2,), "[A]")
    with pytest.raises(TypeError, match=r"x must be torch.int32 or torch.int64, got torch.float32"):
        check_dtype("x", x, (torch.int32, torch.int64))
    with pytest.raises(ValueError, match="x must lie on meta, got cpu"):
        check_device("x", x, torch.device("meta"))


@pytest.mark.parametrize("name", ["reference", Impl.REFERENCE])
def test_a_known_name_is_taken(name: str) -> None:
    assert choose_impl("op", name, Impl.EAGER, KNOWN) is Impl.REFERENCE
    assert choose_impl("op", None, Impl.EAGER, KNOWN) is Impl.EAGER


def test_no_name_is_guessed() -> None:
    with pytest.raises(ValueError, match=r"impl must be one of reference, eager, .*, got 'Eager'"):
        choose_impl("op", "Eager", Impl.EAGER, KNOWN)
    with pytest.raises(UnsupportedError, match="op must use impl reference, eager, got 'onednn'"):
        choose_impl("op", "onednn", Impl.EAGER, KNOWN)
