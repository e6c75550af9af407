"""Lets Triton's interpreter lay out each of its types once: a third of the time of its tests.

Triton 3.6 makes the types of blocks anew for each operation, with names, and NumPy's dtypes as a
table to look one up in. What is computed stays as it is.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from triton.language import core
from triton.runtime import interpreter

_make_block_type = core.block_type.__init__
_make_numpy_dtype = interpreter._get_np_dtype
_block_types: dict[tuple, dict] = {}
_numpy_dtypes: dict[str, np.dtype] = {}


def _block_type(self: core.block_type, element_ty: core.dtype, shape: Sequence) -> None:
    sizes = tuple(x.value if isinstance(x, core.constexpr) else x for x in shape)
    known = _block_types.get((element_ty.name, sizes))
    if known is None:
        _make_block_type(self, element_ty, shape)
        _block_types[element_ty.name, sizes] = vars(self)
    else:
        vars(self).update(known, element_ty=element_ty)


@cache
def _shape(*sizes: int) -> core.tuple:
    return core.tuple([core.constexpr(size) for size in sizes])


def _tensor(self: core.tensor, handle: object, type: core.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape = _shape(*type.shape) if type.is_block() else _shape()
    self.numel = core.constexpr(type.numel if type.is_block() else 1)


def _numpy_dtype(type: core.dtype) -> np.dtype:
    name = type.scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _make_numpy_dtype(type)
    return _numpy_dtypes[name]


def keep_types() -> None:
    """From here on, the interpreter of this process looks up what it has made before."""
    core.block_type.__init__ = _block_type
    core.tensor.__init__ = _tensor
    interpreter._get_np_dtype = _numpy_dtype
