"""Exchange by copies: rings of slots, under any order in which streams may do their work."""

import random
from collections import deque
from collections.abc import Callable
from itertools import accumulate
from typing import cast

import pytest
import torch
from torch import distributed as dist

from sevenfold.config import UnsupportedError
from sevenfold.parallel.copies import NOTHING, Copies, Piece, Rings, Slots, end_to_end, parts

MEMORY, ROWS = 1 << 20, 1 << 30  # how far ranks' rings lie apart, and their rows


class World:
    """Memory of some ranks, and queues of what their streams have to do."""

    def __init__(self, num_ranks: int, slots: Slots, *, queues: int) -> None:
        self.bytes: dict[int, int] = {}
        self.queues = [[deque() for _ in range(queues)] for _ in range(num_ranks)]
        bases = [rank * MEMORY for rank in range(num_ranks)]
        assert Rings.memory_bytes(num_ranks, slots) <= MEMORY
        self.rings = [Rings(rank, bases, slots, Host(self, rank)) for rank in range(num_ranks)]

    def go_on_from(self, number: int) -> None:
        """Let as many chunks have gone between all ranks."""
        for rank, rings in enumerate(self.rings):
            rings._sent, rings._received = ([number] * len(self.rings) for _ in range(2))
            for n in range(2 * len(self.rings)):
                self.bytes[rank * MEMORY + 4 * n] = number % 2**32

    def number(self, address: int) -> int:
        return self.bytes.get(address, 0)

    def work(self, rng: random.Random) -> None:
        """Do what is queued, in any order that streams allow; fail where all wait."""
        queues = [queue for of_rank in self.queues for queue in of_rank]
        while any(queues):
            ready = [queue for queue in queues if queue and queue[0][0]()]
            assert ready, "every stream waits for another"
            rng.choice(ready).popleft()[1]()


class Host:
    """A rank's driver, which queues."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.queues = world, world.queues[rank]

    def wait(self, stream: int, number: int, least: int) -> None:
        def is_reached() -> bool:  # cuStreamWaitValue32's cyclic comparison
            return (self.world.number(number) - least) % 2**32 < 2**31

        self._queue(stream, lambda: None, is_reached)

    def write(self, stream: int, number: int, value: int) -> None:
        self._queue(stream, lambda: self.world.bytes.update({number: value}))

    def copy(self, stream: int, target: int, source: int, num_bytes: int) -> None:
        def copy() -> None:
            for n in range(num_bytes):
                self.world.bytes[target + n] = self.world.number(source + n)

        self._queue(stream, copy)

    def _queue(
        self, stream: int, do: Callable[[], None], ready: Callable[[], bool] = lambda: True
    ) -> None:
        self.queues[stream % len(self.queues)].append((ready, do))


@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_all_rows_come_whatever_streams_do_first(num_ranks: int, queues: int) -> None:
    """Also where both streams of a rank are one queue, as a GPU may have it."""
    for seed in range(20):
        rng = random.Random(seed)
        world = World(num_ranks, Slots(2, 4), queues=queues)
        # Numbers of 32 bits go round.
        world.go_on_from(0 if seed % 2 else 2**32 - 4)
        flights = [sizes_of(num_ranks, rng) for _ in range(5)]
        wanted = []
        for number, sizes in enumerate(flights):
            wanted.append(queued(world, number, sizes, rng))
        world.work(rng)
        for addresses, values in wanted:
            assert [world.number(address) for address in addresses] == values


def sizes_of(num_ranks: int, rng: random.Random) -> list[list[int]]:
    """Bytes from each rank to each other: none, a part, several."""
    return [
        [0 if source == target else rng.choice([0, 1, 4, 7, 23]) for target in range(num_ranks)]
        for source in range(num_ranks)
    ]


def queued(
    world: World, number: int, sizes: list[list[int]], rng: random.Random
) -> tuple[list[int], list[int]]:
    """Queue an exchange on all ranks; return where what comes shall lie, and what it is."""
    addresses, values = [], []
    leaving = [[rng.randbytes(size) for size in of_rank] for of_rank in sizes]
    for rank, rings in enumerate(world.rings):
        source, target = (ROWS * (1 + rank) + (2 * number + n) * 1000 for n in range(2))
        world.bytes |= dict(enumerate(b"".join(leaving[rank]), source))
        received = [of_rank[rank] for of_rank in sizes]
        rings.run((0, 1), end_to_end(source, sizes[rank]), end_to_end(target, received))
        come = b"".join(of_rank[rank] for of_rank in leaving)
        addresses += range(target, target + len(come))
        values += come
    return addresses, values


def test_a_slot_is_not_filled_before_it_is_empty() -> None:
    world = World(2, Slots(2, 4), queues=2)
    world.rings[0].run((0, 1), [NOTHING, Piece(ROWS, 12)], [NOTHING] * 2)
    sending = world.queues[0][0]
    while sending and sending[0][0]():
        sending.popleft()[1]()
    # Two slots are full; the third part waits until the other rank has taken the first.
    assert len(sending) == 3
    world.rings[1].run((0, 1), [NOTHING] * 2, [Piece(2 * ROWS, 12), NOTHING])
    world.work(random.Random(0))
    assert not sending


def test_parts_cover_what_leaves_and_what_comes() -> None:
    sent, received = [5, 0, 9], [0, 0, 4]
    found = list(parts(1, sent, received, 4))
    for leaves, sizes in ((True, sent), (False, received)):
        for peer, size in enumerate(sizes):
            own = [(p.start, p.end) for p in found if p.leaves is leaves and p.peer == peer]
            ends = [min(end, size) for end in range(4, size + 4, 4)]
            assert own == list(zip([0, *accumulate([4] * len(ends))], ends, strict=False))


def test_without_a_gpu_it_is_refused() -> None:
    copies = Copies(cast(dist.ProcessGroup, None))
    with pytest.raises(UnsupportedError, match='exchange by "copies" needs GPUs, got cpu'):
        copies.start(torch.ones(2, 3), [0, 2], [0, 0])


def test_rings_of_any_number_of_ranks_take_what_is_set_aside() -> None:
    for num_ranks in (2, 3, 8, 64):
        slots = Slots.of(num_ranks)
        assert slots.size % 512 == 0
        assert 255 << 20 < Copies.memory_bytes(num_ranks) <= (256 << 20) + 1024
