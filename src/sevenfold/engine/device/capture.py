"""A function of buffers that stay where they are, recorded once and replayed."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Captured:
    """A recorded function: replay runs it anew on what its inputs hold now, into output.

    The next replay, of this or of another that the same Capture recorded, may overwrite output.
    """

    replay: Callable[[], object]
    output: Tensor


class Capture(Protocol):
    """Records a function that takes nothing and returns a tensor."""

    def __call__(self, run: Callable[[], Tensor]) -> Captured:
        """Record it; it may run any number of times now."""
        ...


def run_once(run: Callable[[], Tensor]) -> Captured:
    """A Capture that records nothing: it runs the function now, and a replay does nothing."""
    output = run()
    return Captured(lambda: None, output)


class CudaCapture:
    """Records CUDA graphs that share one memory pool: replay them one after another.

    Their outputs, fp32, lie in the pool and are nobody's: the next that is recorded takes the same
    memory. Logits of many sizes so take no more than those of the largest.

    The first runs outside a graph compile kernels and let libraries allocate what they keep, of
    which each stream has its own: so all go to one. Ranks meet there too, where the function speaks
    to them: NCCL makes its connections, which no recording may do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], Tensor]) -> Captured:
        """Run twice on a stream beside the current one, then record."""
        side = self._side
        with torch.cuda.device(self._device):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # By default other threads may not ask for events meanwhile, as NCCL's watchdog does.
            recording = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
            with _no_collection(), recording:
                output = run()
        self._graphs.append(graph)
        return Captured(graph.replay, _unowned(output))

    def release(self) -> None:
        """Let go of all graphs, of which none is replayed any more.

        From NCCL 2.26 on a communicator is not destroyed while a graph holds operations of its.
        """
        torch.cuda.synchronize(self._device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage meanwhile: CUDA refuses a recording in which another graph is freed."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Unowned:
    """Where a tensor lies, by CUDA's array interface; the tensor itself may be freed."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(tensor.element_size() * n for n in tensor.stride()),
            "typestr": "<f4",
            "version": 2,
        }


def _unowned(output: Tensor) -> Tensor:
    """Return a tensor of the same memory that does not keep it: the graph's pool does."""
    if output.dtype != torch.float32:
        raise AssertionError(f"a recorded output must be fp32, got {output.dtype}")
    return torch.as_tensor(_Unowned(output), device=output.device)
