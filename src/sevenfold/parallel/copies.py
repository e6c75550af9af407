"""Rows between GPUs of one host by their copy engines, which takes no multiprocessor from products.

Each rank has a ring of slots for every other, which that one fills. Chunk n between two ranks:

    sender      waits until taken > n - slots, copies it into slot n % slots, writes filled = n + 1
    receiver    waits until filled > n, copies it out of the slot, writes taken = n + 1

`filled` lies in the receiver's memory and `taken` in the sender's, where each waits. Neither takes
a kernel: streams wait and write by themselves. NCCL's kernels hold multiprocessors, for which a
product of as many programs as there are multiprocessors waits.

Source: CUDA driver API, stream memory operations.
"""

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


class Slots(NamedTuple):
    """Of a ring: how many, and bytes of each."""

    count: int = 4
    size: int = 32 << 20


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
        rank: this one, for and from which there is nothing.
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
        self, streams: tuple[int, int], addresses: tuple[int, int], sizes: tuple[list[int], ...]
    ) -> None:
        """Let streams exchange what lies end to end by rank.

        Args:
            streams: one that sends, one that receives.
            addresses: of what leaves, of what comes.
            sizes: bytes for each rank, bytes from each.
        """
        starts = [list(accumulate(of, initial=0)) for of in sizes]
        for part in parts(self._rank, *sizes, self._slots.size):
            away = 0 if part.leaves else 1
            address = addresses[away] + starts[away][part.peer] + part.start
            move = self._send if part.leaves else self._receive
            move(streams[away], part.peer, address, part.end - part.start)

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
        return -(-2 * num_ranks * _NUMBER_BYTES // 512) * 512

    def _number(self, owner: int, other: int, *, is_taken: bool) -> int:
        return self._bases[owner] + _NUMBER_BYTES * (other + len(self._bases) * is_taken)

    def _slot(self, owner: int, sender: int, number: int) -> int:
        size = len(self._bases)
        ring = (sender - owner - 1) % size
        slot = ring * self._slots.count + number % self._slots.count
        return self._bases[owner] + Rings._head_bytes(size) + slot * self._slots.size


class Copies:
    """An exchange between ranks of one host by copies; ranks meet in the first."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rings: Rings | None = None
        self._streams: list[torch.cuda.Stream] = []
        self._memory = torch.empty(0)

    @staticmethod
    def memory_bytes(num_ranks: int) -> int:
        """Of each rank's rings."""
        return Rings.memory_bytes(num_ranks, Slots())

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, Arrival]:
        """As Exchange says; there is nothing for this rank itself.

        Raises:
            UnsupportedError: in the first, the rows are not on a GPU, or the ranks not on one host.
        """
        rings = self._rings or self._meet(rows.device)
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        row_bytes = rows.shape[1:].numel() * rows.itemsize
        ready = torch.cuda.current_stream(rows.device).record_event()
        for stream in self._streams:
            stream.wait_event(ready)
        sending, receiving = (stream.cuda_stream for stream in self._streams)
        sizes = ([n * row_bytes for n in sent], [n * row_bytes for n in received])
        rings.run((sending, receiving), (rows.data_ptr(), arrived.data_ptr()), sizes)
        return arrived, _Copied(rows, [stream.record_event() for stream in self._streams])

    def _meet(self, device: torch.device) -> Rings:
        if device.type != "cuda":
            raise UnsupportedError(
                f'parallel.expert_exchange = "copies" needs GPUs, got rows on {device}'
            )
        self._check_host()
        # Built on what torch calls alpha: its memory that processes share, and their addresses.
        from torch.distributed import _symmetric_memory

        num_bytes = self.memory_bytes(dist.get_world_size(self._group))
        self._memory = _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        self._memory.zero_()
        torch.cuda.synchronize(device)  # nobody's number is written before it is 0
        bases = _symmetric_memory.rendezvous(self._memory, self._group).buffer_ptrs
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in range(2)]
        self._rings = Rings(dist.get_rank(self._group), bases, Slots(), _CudaDriver())
        return self._rings

    def _check_host(self) -> None:
        hosts: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(hosts, socket.gethostname(), group=self._group)
        if len(set(hosts)) > 1:
            raise UnsupportedError(
                f'parallel.expert_exchange = "copies" needs the ranks of expert on one host, got '
                f"{', '.join(sorted(set(hosts)))}"
            )


class _Copied:
    """Rows, held until they have left, and when all have left and come."""

    def __init__(self, rows: Tensor, events: list[torch.cuda.Event]) -> None:
        self._rows: Tensor | None = rows
        self._events = events

    def wait(self) -> None:
        """Let the current stream wait for both."""
        for event in self._events:
            event.wait()
        self._rows = None


class _CudaDriver:
    """CUDA's driver, as Driver says."""

    def __init__(self) -> None:
        # torch brings it for GPUs.
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

        self._driver = driver

    def wait(self, stream: int, number: int, least: int) -> None:
        at_least = 0  # CU_STREAM_WAIT_VALUE_GEQ
        self._check(self._driver.cuStreamWaitValue32(stream, number, least, at_least))

    def write(self, stream: int, number: int, value: int) -> None:
        with_barrier = 0  # CU_STREAM_WRITE_VALUE_DEFAULT
        self._check(self._driver.cuStreamWriteValue32(stream, number, value, with_barrier))

    def copy(self, stream: int, target: int, source: int, num_bytes: int) -> None:
        self._check(self._driver.cuMemcpyAsync(target, source, num_bytes, stream))

    def _check(self, result: tuple[Any]) -> None:
        (error,) = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"CUDA's driver must not fail, got {error!r}")
