"""Where tests of Triton kernels run: on a GPU, or under Triton's interpreter on a CPU.

A module of such tests sets `pytestmark = GPU_UNLESS_INTERPRETED` and makes its tensors on DEVICE.
triton_interpreter.check_interpreted runs the same module without a GPU.
"""

import os
from types import SimpleNamespace

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU_UNLESS_INTERPRETED = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# The interpreter's bf16 is broken.
LOW_DTYPES = (torch.float16,) if INTERPRETED else (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *LOW_DTYPES)


def let_the_interpreter_count() -> None:
    """Let a loop's bounds be run-time numbers: NumPy 2.4 no longer makes an int of a [1] array."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_count(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_count


def patch_the_language_once() -> None:
    """Give triton.language its interpreted functions for good.

    The interpreter does so anew as a kernel begins and as each function that it calls begins, which
    takes longer than most of them run.
    """
    from triton import language
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda _function: interpreter._LangPatchScope()


if INTERPRETED:
    let_the_interpreter_count()
    patch_the_language_once()
