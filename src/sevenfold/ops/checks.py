"""Argument checks that operators share: `<name> must <rule>, got <value>`."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.types import Impl

# torch.compile follows a look-up, where torch 2.11 does not follow an enumeration.
_NAMED = {str(impl): impl for impl in Impl}


def check_shape(name: str, x: Tensor, shape: Sequence[int], letters: str) -> None:
    """Raise ValueError unless x has the given shape, told in the given letters."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {letters} = {list(shape)}, got {list(x.shape)}")


def check_dtype(name: str, x: Tensor, dtypes: Collection[torch.dtype]) -> None:
    """Raise TypeError unless x has one of the dtypes."""
    if x.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {x.dtype}")


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Raise ValueError unless x lies on the device."""
    if x.device != device:
        raise ValueError(f"{name} must lie on {device}, got {x.device}")


def choose_impl(op: str, impl: Impl | str | None, default: Impl, known: Collection[Impl]) -> Impl:
    """Return the named implementation, or the default when none is named; never fall back.

    Raises:
        ValueError: the name is not an implementation at all.
        UnsupportedError: the operator has no implementation of that name.
    """
    if impl is None:
        return default
    named = _NAMED.get(str(impl))
    if named is None:
        raise ValueError(f"impl must be one of {', '.join(Impl)}, got {impl!r}")
    if named not in known:
        names = ", ".join(known)
        raise UnsupportedError(f"{op} must use impl {names}, got {str(impl)!r}")
    return named
