"""Rows between GPUs of one host by their copy engines, which hold no multiprocessor all of the way.

Each rank has a ring of slots for every other, which that one fills. Chunk n between two ranks:

    sender      waits until taken > n - slots, copies it into slot n % slots, writes filled = n + 1
    receiver    waits until filled > n, copies it out of the slot, writes taken = n + 1

`filled` lies in the receiver's memory and `taken` in the sender's, where each waits: by operations
of streams, which take no kernel. NCCL's kernels hold multiprocessors, for which a product of as
many programs as there are multiprocessors waits. The copy out of a slot stays within a GPU, and
the driver does it with what multiprocessors are free.

Source: CUDA driver API, stream memory operations.
"""

import ctypes
import socket
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from sevenfold.config import UnsupportedError
from sevenfold.parallel.exchange import Arrival

_NUMBER_BYTES, _MASK = 4, 2**32 - 1
_ALIGNMENT = 512  # of slots
_SLOTS, _RINGS_BYTES = 4, 256 << 20


class Slots(NamedTuple):
    """Of a ring: how many, and bytes of each."""

    count: int
    size: int

    @staticmethod
    def of(num_ranks: int) -> "Slots":
        """As large as suits two ranks or more, each of which has a ring for every other.

        The more ranks there are, the less goes from one to another: in about as many parts.
        """
        size = _RINGS_BYTES // (_SLOTS * (num_ranks - 1))
        return Slots(_SLOTS, size // _ALIGNMENT * _ALIGNMENT)


class Piece(NamedTuple):
    """Memory of this rank's that goes to a rank, or that what comes from it is written to."""

    address: int
    num_bytes: int


NOTHING = Piece(0, 0)


class Part(NamedTuple):
    """Bytes start to end of what goes to a rank, or comes from it."""

    leaves: bool
    peer: int
    start: int
    end: int


class Driver(Protocol):
    """What a stream does without a kernel. Memory is named by address, streams by handle."""

    def wait(self, stream: int, number: int, least: int) -> None:
        """Go on when a number of 32 bits, going round, is at least so large."""
        ...

    def write(self, stream: int, number: int, value: int) -> None:
        """Write a number when all before it is done and seen."""
        ...

    def copy(self, stream: int, target: int, source: int, num_bytes: int) -> None:
        """Copy, also from or to another GPU."""
        ...


def parts(rank: int, sent: Sequence[int], received: Sequence[int], most: int) -> Iterator[Part]:
    """Cut an exchange into parts, in an order that waits for nobody in a circle.

    A part waits for none but such as come before it in the order of (start, distance of the ranks,
    leaving first), on any rank: so all may lie in one queue, as streams of a GPU may.

    Args:
        rank: this one, of which there is no part.
        sent, received: bytes for and from each rank.
        most: bytes of a part.
    """
    size = len(sent)
    for start in range(0, max(*sent, *received), most):
        for distance in range(1, size):
            target, source = (rank + distance) % size, (rank - distance) % size
            for leaves, peer, end in (
                (True, target, sent[target]),
                (False, source, received[source]),
            ):
                if start < end:
                    yield Part(leaves, peer, start, min(start + most, end))


class Rings:
    """The rings of all ranks, as one of them uses them."""

    def __init__(self, rank: int, bases: Sequence[int], slots: Slots, driver: Driver) -> None:
        """Begin where nothing has been sent.

        Args:
            rank: this one.
            bases: where the memory of each rank begins in this process, memory_bytes of it, of
                which the first are 0.
            slots: of each ring.
            driver: what does the work.
        """
        self._rank, self._bases, self._slots, self._driver = rank, bases, slots, driver
        self._sent, self._received = [0] * len(bases), [0] * len(bases)

    @staticmethod
    def memory_bytes(num_ranks: int, slots: Slots) -> int:
        """Bytes of each rank."""
        return Rings._head_bytes(num_ranks) + (num_ranks - 1) * slots.count * slots.size

    def run(
        self, streams: tuple[int, int], leaving: Sequence[Piece], coming: Sequence[Piece]
    ) -> None:
        """Let streams exchange pieces.

        Args:
            streams: one that sends, one that receives.
            leaving, coming: for each rank and from each; what stands for this one is not moved.
        """
        sending, receiving = streams
        sent, received = ([piece.num_bytes for piece in of] for of in (leaving, coming))
        for leaves, peer, start, end in parts(self._rank, sent, received, self._slots.size):
            if leaves:
                self._send(sending, peer, leaving[peer].address + start, end - start)
            else:
                self._receive(receiving, peer, coming[peer].address + start, end - start)

    def _send(self, stream: int, peer: int, source: int, num_bytes: int) -> None:
        number = self._sent[peer]
        if number >= self._slots.count:
            taken = self._number(self._rank, peer, is_taken=True)
            self._driver.wait(stream, taken, (number + 1 - self._slots.count) & _MASK)
        slot = self._slot(peer, self._rank, number)
        self._driver.copy(stream, slot, source, num_bytes)
        filled = self._number(peer, self._rank, is_taken=False)
        self._driver.write(stream, filled, (number + 1) & _MASK)
        self._sent[peer] = number + 1

    def _receive(self, stream: int, peer: int, target: int, num_bytes: int) -> None:
        number = self._received[peer]
        filled = self._number(self._rank, peer, is_taken=False)
        self._driver.wait(stream, filled, (number + 1) & _MASK)
        self._driver.copy(stream, target, self._slot(self._rank, peer, number), num_bytes)
        taken = self._number(peer, self._rank, is_taken=True)
        self._driver.write(stream, taken, (number + 1) & _MASK)
        self._received[peer] = number + 1

    @staticmethod
    def _head_bytes(num_ranks: int) -> int:
        """Of the numbers; slots begin where copies like to."""
        return -(-2 * num_ranks * _NUMBER_BYTES // _ALIGNMENT) * _ALIGNMENT

    def _number(self, owner: int, other: int, *, is_taken: bool) -> int:
        return self._bases[owner] + _NUMBER_BYTES * (other + len(self._bases) * is_taken)

    def _slot(self, owner: int, sender: int, number: int) -> int:
        size = len(self._bases)
        ring = (sender - owner - 1) % size
        slot = ring * self._slots.count + number % self._slots.count
        return self._bases[owner] + Rings._head_bytes(size) + slot * self._slots.size


class Copies:
    """Exchanges between ranks of one host by copies; ranks meet in the first."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rings: Rings | None = None
        self._streams: list[torch.cuda.Stream] = []
        self._memory = torch.empty(0)

    @staticmethod
    def memory_bytes(num_ranks: int) -> int:
        """Of each rank's rings."""
        return Rings.memory_bytes(num_ranks, Slots.of(num_ranks))

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, Arrival]:
        """As Exchange says; there is nothing for this rank itself.

        Raises:
            UnsupportedError: in the first, the rows are not on a GPU, or the ranks not on one host.
        """
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        row_bytes = rows.shape[1:].numel() * rows.itemsize
        pieces = (
            end_to_end(x.data_ptr(), [n * row_bytes for n in sizes])
            for x, sizes in ((rows, sent), (arrived, received))
        )
        return arrived, self.move((rows, arrived), *pieces)

    def move(
        self, tensors: tuple[Tensor, ...], leaving: list[Piece], coming: list[Piece]
    ) -> Arrival:
        """Exchange pieces of tensors, which are held until they have been waited for.

        Args:
            tensors: on one GPU, whose current stream has written what leaves.
            leaving, coming: for each rank and from each; what stands for this one is not moved.

        Returns:
            What lets the current stream wait until all has left and come.

        Raises:
            UnsupportedError: as start does.
        """
        device = tensors[0].device
        rings = self._rings or self._meet(device)
        ready = torch.cuda.current_stream(device).record_event()
        for stream in self._streams:
            stream.wait_event(ready)
        sending, receiving = (stream.cuda_stream for stream in self._streams)
        rings.run((sending, receiving), leaving, coming)
        return _Moved(tensors, [stream.record_event() for stream in self._streams])

    def _meet(self, device: torch.device) -> Rings:
        if device.type != "cuda":
            raise UnsupportedError(f'parallel: exchange by "copies" needs GPUs, got {device}')
        # Built on what torch calls alpha: its memory that processes share, and their addresses.
        from torch.distributed import _symmetric_memory

        num_ranks = dist.get_world_size(self._group)
        num_bytes = self.memory_bytes(num_ranks)
        self._memory = _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        self._memory.zero_()
        # No number is written before it is 0: hosts are compared when all ranks have come here.
        torch.cuda.synchronize(device)
        self._check_host()
        bases = _symmetric_memory.rendezvous(self._memory, self._group).buffer_ptrs
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in range(2)]
        slots, rank = Slots.of(num_ranks), dist.get_rank(self._group)
        self._rings = Rings(rank, bases, slots, _CudaDriver())
        return self._rings

    def _check_host(self) -> None:
        hosts: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(hosts, socket.gethostname(), group=self._group)
        if len(set(hosts)) > 1:
            raise UnsupportedError(
                f'parallel: exchange by "copies" needs ranks of one host, got '
                f"{', '.join(sorted(set(hosts)))}"
            )


def end_to_end(address: int, sizes: Sequence[int]) -> list[Piece]:
    """Pieces of these sizes, one behind the other."""
    starts = accumulate(sizes, initial=address)
    return [Piece(start, size) for start, size in zip(starts, sizes, strict=False)]


class _Moved:
    """Tensors, held until what leaves has left, and when all has left and come."""

    def __init__(self, tensors: tuple[Tensor, ...], events: list[Any]) -> None:
        self._tensors, self._events = tensors, events

    def wait(self) -> None:
        """Let the current stream wait for both."""
        for event in self._events:
            event.wait()
        self._tensors = ()


class _CudaDriver:
    """CUDA's driver, as Driver says.

    Not through cuda.bindings, whose objects for each argument cost 5 us a call: an exchange takes
    some twenty calls, which the next kernels' launches wait for.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        stream, address, number = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
        self._wait = library.cuStreamWaitValue32_v2
        self._write = library.cuStreamWriteValue32_v2
        self._copy = library.cuMemcpyAsync
        for function in (self._wait, self._write):
            function.argtypes = (stream, address, number, number)
        self._copy.argtypes = (address, address, ctypes.c_size_t, stream)

    def wait(self, stream: int, number: int, least: int) -> None:
        at_least = 0  # CU_STREAM_WAIT_VALUE_GEQ
        _check("cuStreamWaitValue32", self._wait(stream, number, least, at_least))

    def write(self, stream: int, number: int, value: int) -> None:
        with_barrier = 0  # CU_STREAM_WRITE_VALUE_DEFAULT
        _check("cuStreamWriteValue32", self._write(stream, number, value, with_barrier))

    def copy(self, stream: int, target: int, source: int, num_bytes: int) -> None:
        _check("cuMemcpyAsync", self._copy(target, source, num_bytes, stream))


def _check(name: str, error: int) -> None:
    if error:
        raise RuntimeError(f"{name} of CUDA's driver must not fail, got CUresult {error}")
