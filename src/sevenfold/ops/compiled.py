"""What the loops share that numba compiles. Imported late: numba takes half a second to load."""

import math
import threading
from collections.abc import Callable

import numba
import numpy as np
import torch
from numba import njit, prange

_PAGE = 1024  # fp32 elements of a page of 4 KB
_F = np.float32
_LANES = 16  # of fp32 in a 512-bit register
_LINE_BYTES = 64
# Sums may be reordered; NaN and infinity keep their meaning.
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}


def _launch_threads() -> int:
    """Let numba start its threads, and return their number.

    numba's OpenMP layer then sets the number that PyTorch uses, in the middle of a first step.
    """
    before = torch.get_num_threads()
    threads = numba.get_num_threads()
    torch.set_num_threads(before)
    return threads


_MOST_THREADS = _launch_threads()
_caller = threading.local()


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a loop over prange for training: the same bits in every process.

    Without FASTMATH: where sums may be reordered, what numba 0.68 has just compiled and what it
    loads from its cache order them differently, and a run that is resumed must not show it. So a
    loop that sums goes through dot32 or sum32.
    """
    return njit(parallel=True, fastmath=False, cache=True)(function)


def use_torch_threads() -> None:
    """Run the caller's compiled loops with as many threads as PyTorch uses, if numba has them."""
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    # numba takes 4 us to set them, for each thread that calls; a decoding step asks 20 times.
    if getattr(_caller, "threads", None) != threads:
        numba.set_num_threads(threads)
        _caller.threads = threads


def touched(*shape: int) -> torch.Tensor:
    """As empty, with every page already there.

    A virtual machine may hand free pages back to its host, after 2 s where this was measured (2
    cores of Zen 4): 537 MB then take 1.1 s of a processor's time, and 0.05 s before that. Who
    needs the memory that an earlier call has freed, and only after seconds of work, takes it first.
    """
    memory = empty(*shape)
    use_torch_threads()
    _touch(memory.view(-1).numpy())
    return memory


@compiled
def _touch(memory):
    for page in prange(-(-len(memory) // _PAGE)):
        memory[page * _PAGE] = 0


def even_parts(units: int) -> int:
    """Into how many parts each unit of work is cut, so that threads have about the same of it."""
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    for parts in range(1, threads):
        if -(-units * parts // threads) * threads <= _EVEN * units * parts:
            return parts
    return threads


def lent(x: torch.Tensor) -> np.ndarray:
    """View a weight as an array and leave its storage free to be resized.

    torch.Tensor.numpy pins the storage for good, and fully_shard frees a weight between its uses.
    """
    return torch.from_dlpack(x.detach()).numpy()


_EVEN = 1.1  # the longest share of work over the mean, at most
_HUGE_ELEMENTS = 2**20  # of fp32: from 4 MB on numpy asks for huge pages


def empty(*shape: int) -> torch.Tensor:
    """A fresh fp32 tensor on the CPU, in huge pages from 4 MB on, that begins a line of the cache.

    On a virtual machine a fresh page of 4 KB costs 2 to 10 us.
    """
    size = math.prod(shape)
    if size < _HUGE_ELEMENTS:
        return torch.empty(shape, dtype=torch.float32)
    room = np.empty(size + _LANES, np.float32)
    first = -room.__array_interface__["data"][0] % _LINE_BYTES // room.itemsize
    return torch.from_numpy(room[first : first + size].reshape(shape))


@njit(inline="always")
def dot32(x, y):
    """sum_i x_i y_i of fp32 vectors, in an order of its own that LLVM turns into vectors."""
    lanes = np.zeros(_LANES, np.float32)
    whole = len(x) // _LANES * _LANES
    for i in range(0, whole, _LANES):
        for lane in range(_LANES):
            lanes[lane] += x[i + lane] * y[i + lane]
    total = _F(0)
    for i in range(whole, len(x)):
        total += x[i] * y[i]
    for lane in range(_LANES):
        total += lanes[lane]
    return total


@njit(inline="always")
def sum32(x):
    """sum_i x_i of an fp32 vector, in the order of dot32."""
    lanes = np.zeros(_LANES, np.float32)
    whole = len(x) // _LANES * _LANES
    for i in range(0, whole, _LANES):
        for lane in range(_LANES):
            lanes[lane] += x[i + lane]
    total = _F(0)
    for i in range(whole, len(x)):
        total += x[i]
    for lane in range(_LANES):
        total += lanes[lane]
    return total


@njit(inline="always")
def max32(x):
    """The largest of an fp32 vector with at least one element."""
    lanes = np.full(_LANES, x[0])
    whole = len(x) // _LANES * _LANES
    for i in range(0, whole, _LANES):
        for lane in range(_LANES):
            lanes[lane] = max(lanes[lane], x[i + lane])
    top = x[0]
    for i in range(whole, len(x)):
        top = max(top, x[i])
    for lane in range(_LANES):
        top = max(top, lanes[lane])
    return top


@njit(inline="always")
def exp32(x):
    """exp of one fp32 number to 2 units in the last place, in steps that LLVM turns into vectors.

    exp(x) = 2^n exp(x - n ln 2), ln 2 in two parts; the polynomial is that of Cephes' expf. NaN
    stays NaN; below -87.3 it gives 1e-38 and above 88.3 it gives 2e38.
    """
    inside = min(max(x, _F(-87.3)), _F(88.3))
    n = np.floor(inside * _F(1.44269504088896341) + _F(0.5))
    r = inside - n * _F(0.693359375) + n * _F(2.12194440e-4)
    p = _F(1.9875691500e-4)
    p = p * r + _F(1.3981999507e-3)
    p = p * r + _F(8.3334519073e-3)
    p = p * r + _F(4.1665795894e-2)
    p = p * r + _F(1.6666665459e-1)
    p = p * r + _F(5.0000001201e-1)
    bits = (np.int32(n) + np.int32(127)) << np.int32(23)
    power = (p * r * r + r + _F(1)) * np.int32(bits).view(np.float32)
    return x if x != x else power
