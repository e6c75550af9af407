"""Launches of Triton kernels that have been compiled before, past Triton's own search for them.

Triton (3.6) binds, specialises and looks up the arguments of every launch anew, and calls hooks
that are seldom there. Here a kernel is found by a key that is at least as fine as Triton's, and
gets plain addresses, about which its launcher need not ask the driver. On a core of an AMD EPYC,
without the driver's time, a launch with 9 arguments takes 5.9 us and not 11.0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime._async_compile import active_mode

_INT32, _INT64 = 2**31, 2**63
# A kernel of another version may be called otherwise.
_IS_KNOWN_TRITON = triton.__version__.startswith("3.6.")


class BulkCopies(NamedTuple):
    """A tensor whose blocks a kernel for Hopper GPUs copies: a descriptor that is not checked.

    base: on a 16-byte border; steps from one index to the next are multiples of 16 bytes but the
        last, which is one element.
    """

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    padding = "zero"

    def checked(self) -> Any:
        """Triton's own descriptor."""
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        element = gl.bfloat16 if self.base.dtype == torch.bfloat16 else gl.float16
        block = list(self.block_shape)
        layout: Any = gl.NVMMASharedLayout.get_default_for(block, element)
        return TensorDescriptor(self.base, list(self.shape), list(self.strides), block, layout)


class _Compiled(NamedTuple):
    run: Any
    function: Any
    metadata: Any
    constants: tuple[Any, ...]


class Launched:
    """A kernel whose launches cost less from the second of their kind on; called as Triton's.

    Arguments are positional, constants and options are named.

    kernel: Triton's.
    """

    def __init__(self, kernel: triton.JITFunction) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        active: Any = driver.active
        device = active.get_current_device()
        kinds, values = launch_key(args)
        # With their types: True equals 1, and is another constant to Triton.
        named = constants.values()
        key = (device, kinds, *constants, *named, *map(type, named))
        compiled = self._compiled.get(key)
        if compiled is None or kinds is None or _is_watched():
            found = self._launch_by_triton(grid, args, constants)
            # What was compiled for a watcher may hold what it asked for.
            if kinds is not None and found is not None and not _is_watched():
                self._compiled[key] = found
            return
        x, y, z = (*grid, 1, 1)[:3]
        compiled.run(
            x, y, z, active.get_current_stream(device), compiled.function, compiled.metadata,
            None, None, None, *values, *compiled.constants,
        )  # fmt: skip

    def _launch_by_triton(
        self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
    ) -> _Compiled | None:
        given = [x.checked() if type(x) is BulkCopies else x for x in args]
        found: Any = self.kernel[grid](*given, **constants)
        params = self.kernel.params
        unnamed, named = params[: len(args)], params[len(args) :]
        # The key holds the values of what is named alone.
        is_split = all(p.is_constexpr for p in named) and not any(p.is_constexpr for p in unnamed)
        # Who compiles several kernels together launches none.
        is_launched = type(found) is CompiledKernel and active_mode.get() is None
        if not is_launched or not is_split or not _IS_KNOWN_TRITON:
            return None
        rest = tuple(constants.get(p.name, p.default) for p in named)
        return _Compiled(found.run, found.function, found.packed_metadata, rest)


def launched(kernel: Any) -> Any:
    """Decorate a kernel that the host launches; Triton's interpreter has no use for it."""
    return Launched(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def launch_key(args: tuple[Any, ...]) -> tuple[tuple[Any, ...] | None, list[Any]]:
    """Return what Triton specialises a kernel for, or finer, and the values for its launcher.

    The key holds dtypes; whether addresses and whole numbers are multiples of 16; the number 1;
    bits of a number, 32 or 64. Each argument's part says by its first element how long it is, so
    that keys are equal only where all parts are. None where an argument's kind is not known.
    """
    key: list[Any] = []
    values: list[Any] = []
    for x in args:
        kind, value = type(x), x
        if kind is Tensor or kind is torch.nn.Parameter:
            value = x.data_ptr()
            key += (x.dtype, x.is_cuda, not value & 15)
        elif kind is int:
            bits = 2 if -_INT32 <= x < _INT32 else 4 if -_INT64 <= x < _INT64 else 6
            key.append(1 if x == 1 else bits + (not x & 15))
        elif x is None or kind is float:
            key.append(kind)
        elif kind is BulkCopies:
            base = x.base
            key += (kind, base.dtype, x.block_shape, not base.data_ptr() & 15)
        elif kind is bool:
            key += (kind, x)
        else:
            return None, []
        values.append(value)
    return tuple(key), values


def _is_watched() -> bool:
    """Whether somebody waits for launches, a profiler for one, or wants kernels compiled alone."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    has_hooks = (enter and enter.calls) or (leave and leave.calls)
    # By these Triton compiles otherwise.
    is_asked = knobs.compilation.instrumentation_mode or knobs.runtime.debug
    return bool(has_hooks or is_asked) or active_mode.get() is not None
