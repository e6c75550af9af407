"""Triton kernels compiled by several threads at once, before anybody waits for them.

Triton compiles a kernel when it is first launched, so that a model's kernels are compiled one after
another. Here its functions run once without a launch: each kernel that they meet is handed to a
thread, with the very arguments that it will have. Importing this file imports no Triton.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch

# Beside a thread runs NVIDIA's assembler, in a process of its own.
_MOST_THREADS = 16
_LOOK_S = 0.1
# What is replaced meanwhile is the process's.
_one_at_a_time = Lock()


class Compilation:
    """The kernels that are being compiled."""

    def __init__(self, futures: dict[str, Any]) -> None:
        self._futures = futures

    def __len__(self) -> int:
        """How many were met that were not compiled yet."""
        return len(self._futures)

    def settle(self) -> None:
        """Let kernels that are compiled be found without a look at their source."""
        for kernel in self._futures.values():
            if kernel.future.done():
                kernel.result(ignore_errors=True)


@contextmanager
def compiled_together(stopped: Callable[[], bool]) -> Iterator[Compilation]:
    """Compile what this thread launches within, and launch none of it; the end waits for all.

    Where `stopped` says so meanwhile, or an error leaves the block, nothing is waited for: kernels
    that no thread has begun are given up, and those that are begun come to their end by themselves.

    What kernels would have written is zero: the tensors that are allocated for them are cleared, so
    that an operator of PyTorch's that reads indices from there reads valid ones. Everything else
    runs. A kernel that cannot be compiled says so where it is launched.
    """
    from triton.runtime._async_compile import AsyncCompileMode, active_mode
    from triton.runtime.jit import JITFunction

    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    launch: Callable[..., Any] = JITFunction.run

    def prepare(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        only = active_mode.get() is mode  # of this thread
        return launch(self, *args, grid=grid, warmup=warmup or only, **kwargs)

    def cleared(allocate: Callable[..., Any], clear: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            return (clear if active_mode.get() is mode else allocate)(*args, **options)

        return call

    with ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")
        mode = stack.enter_context(AsyncCompileMode(pool, ignore_errors=True))
        stack.callback(_end, pool, mode.raw_futures)
        stack.enter_context(_replaced(JITFunction, "run", prepare))
        for owner, name, clear in (
            (torch, "empty", torch.zeros),
            (torch, "empty_like", torch.zeros_like),
            (torch.Tensor, "new_empty", torch.Tensor.new_zeros),
        ):
            stack.enter_context(_replaced(owner, name, cleared(getattr(owner, name), clear)))
        yield Compilation(mode.future_kernels)
        _wait(mode.raw_futures, stopped)


def _wait(futures: Sequence[Future[Any]], stopped: Callable[[], bool]) -> None:
    waiting = set(futures)
    while waiting and not stopped():
        _, waiting = wait(waiting, timeout=_LOOK_S)


def _end(pool: ThreadPoolExecutor, futures: list[Future[Any]]) -> None:
    """Give up what has not begun, and leave to Triton, which waits for all, only what has ended."""
    pool.shutdown(wait=False, cancel_futures=True)
    futures[:] = [future for future in futures if future.done() and not future.cancelled()]


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module or a class another attribute within, and take it back."""
    is_own, held = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, held)
        else:
            delattr(owner, name)
