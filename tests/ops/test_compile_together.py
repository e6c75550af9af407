"""Kernels compiled by threads for a GPU that is not there: each once, none launched, all zero."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sevenfold.ops.compile_together import compiled_together
from sevenfold.ops.rms_norm import triton_rms_norm
from sevenfold.ops.rms_norm.triton_rms_norm import normed


class NoGpu:
    """What Triton asks a driver before it compiles for a Hopper GPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def _no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NoGpu())
    yield
    triton_rms_norm._forward_kernel.kernel.device_caches.clear()


def never() -> bool:
    return False


def after_looks(num: int) -> Callable[[], bool]:
    """A stop that comes when it has been looked for so many times."""
    looks = iter([False] * num)
    return lambda: next(looks, True)


def norm(width: int, rows: int = 3) -> torch.Tensor:
    x = torch.randn(rows, width)
    return normed(x, None, torch.ones(width), 1e-5)


def test_kernels_are_compiled_once_and_give_zeros() -> None:
    with compiled_together(never) as compilation:
        for width in (32, 64, 32):
            found = norm(width)
            assert found.shape == (3, width)
            assert not found.any()
        assert len(compilation) == 2
        compilation.settle()
    kept = triton_rms_norm._forward_kernel.kernel.device_caches[0][0]
    assert [type(kernel) for kernel in kept.values()] == [CompiledKernel] * 2
    # Whoever launches one now finds it.
    with compiled_together(never) as compilation:
        norm(64)
        assert len(compilation) == 0


def test_all_is_as_it_was_behind_it() -> None:
    run, empty, new_empty = JITFunction.run, torch.empty, torch.Tensor.new_empty

    def fail() -> None:
        with compiled_together(never):
            assert torch.empty is not empty
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert JITFunction.run is run
    assert torch.empty is empty
    assert torch.Tensor.new_empty is new_empty
    assert "new_empty" not in vars(torch.Tensor)


def test_a_kernel_that_cannot_be_compiled_says_so_where_it_is_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such instruction")

    kernel = triton_rms_norm._forward_kernel.kernel
    norm_caches = kernel.device_caches[0]
    monkeypatch.setattr(kernel, "compile", refuse)
    with compiled_together(never) as compilation:
        norm(32)
        assert len(compilation) == 1
    assert not norm_caches[0]
    with pytest.raises(RuntimeError, match="no such instruction"):
        norm(32)


def test_other_threads_allocate_as_ever_and_compile_one_after_another() -> None:
    def allocate() -> None:
        torch.empty(2, 2, 2, 2, memory_format=torch.channels_last)
        with compiled_together(never):
            norm(64)

    empty = torch.empty
    with ThreadPoolExecutor(1) as pool:
        with compiled_together(never):
            other = pool.submit(allocate)
            norm(64)
        other.result()
    assert torch.empty is empty


@pytest.mark.parametrize("fails", [False, True], ids=["stopped", "failed"])
def test_a_stop_or_an_error_waits_for_nothing_and_gives_up_what_has_not_begun(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on = [], threading.Event()

    def block(*args: object, **kwargs: object) -> None:
        begun.append(args)
        goes_on.wait(60)
        raise RuntimeError("too late")

    monkeypatch.setattr(triton_rms_norm._forward_kernel.kernel, "compile", block)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    run = JITFunction.run
    with suppress(KeyboardInterrupt), compiled_together(after_looks(2)) as compilation:
        for width in (32, 64, 128, 256, 512):
            norm(width)
        assert len(compilation) == 5
        if fails:
            raise KeyboardInterrupt
    assert not goes_on.is_set()
    assert JITFunction.run is run
    goes_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("compile"):
            thread.join()
    assert len(begun) <= 2
