"""A memory to schedule against: it counts, remembers prefixes, and refuses every misuse."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from sevenfold.engine.request import Request
from sevenfold.engine.scheduler import DecodeRow, PrefillChunk, Scheduler, SchedulerConfig, Step

PAGE = 4
IDS = count()


@dataclass
class FakeCache:
    """num_pages pages of PAGE tokens and num_states states; what it keeps costs nothing."""

    num_pages: int
    num_states: int
    pages: dict[Request, int] = field(default_factory=dict)
    kept: dict[bytes, set[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(set))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    when_open: Callable[[Request, int], object] = lambda request, computed: None
    when_close: Callable[[Request], object] = lambda request: None

    def open(self, request: Request) -> int | None:
        self.calls["open"] += 1
        assert request not in self.pages
        hit = self.match(request)
        if len(self.pages) == self.num_states or self.num_free < hit // PAGE:
            return None
        self.pages[request] = hit // PAGE
        self.when_open(request, hit)
        return hit

    def match(self, request: Request) -> int:
        tokens, kept = request.tokens, self.kept[request.salt]
        places = range(PAGE, len(tokens), PAGE)
        return max((n for n in places if tokens[:n] in kept), default=0)

    def extend(self, request: Request, num_tokens: int) -> bool:
        self.calls["extend"] += 1
        held, need = self.pages[request], -(-num_tokens // PAGE)
        if need - held > self.num_free:
            return False
        self.pages[request] = max(held, need)
        return True

    def snapshots_due(self, request: Request, first: int, end: int) -> list[int]:
        self.calls["snapshots_due"] += 1
        assert end <= self.pages[request] * PAGE
        return snapshots(request, first, end)

    def close(self, request: Request, *, keep: bool) -> None:
        del self.pages[request]
        self.when_close(request)
        if keep:
            tokens = request.tokens[: request.num_computed_tokens]
            self.kept[request.salt] |= {tokens[:n] for n in range(PAGE, len(tokens) + 1, PAGE)}

    @property
    def num_free(self) -> int:
        return self.num_pages - sum(self.pages.values())


def snapshots(request: Request, first: int, end: int) -> list[int]:
    """At every mark, and at every second page of the output."""
    output = range(len(request.prompt) + 1, end + 1)
    places = {*request.marks, *(at for at in output if at % (2 * PAGE) == 0)}
    return sorted(at for at in places if first < at <= end)


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class World:
    scheduler: Scheduler
    cache: FakeCache
    clock: Clock
    config: SchedulerConfig

    def submit(self, prompt: int | Sequence[int], max_tokens: int = 4, **fields: object) -> Request:
        """prompt: tokens, or how many tokens that no other request has."""
        serial = next(IDS)
        tokens = range(1000 * serial, 1000 * serial + prompt) if isinstance(prompt, int) else prompt
        request = Request(f"r{serial}", tuple(tokens), max_tokens, **fields)
        self.scheduler.submit(request)
        return request

    def step(self) -> Step:
        """One step whose every draft is refused."""
        step = self.scheduler.step()
        for row in rows(step):
            self.scheduler.record(row.request, (7,) if gives_token(row) else ())
        return step

    def steps(self, most: int = 1000) -> Iterator[Step]:
        """Steps until nothing is under way."""
        for _ in range(most):
            if not self.scheduler.has_work:
                return
            yield self.step()
        raise AssertionError(f"work must end within {most} steps, got none of it")


def world(num_pages: int = 100, num_states: int = 100, **limits: float) -> World:
    defaults = {
        "max_request_tokens": num_pages * PAGE,
        "page_tokens": PAGE,
        "max_step_tokens": 64,
        "max_running": 16,
        "max_prefills": 3,
        "min_chunk_tokens": 8,
        "max_waiting": 32,
        "headroom_tokens": 0,
    }
    config = SchedulerConfig(**(defaults | limits))
    cache, clock = FakeCache(num_pages, num_states), Clock()
    return World(Scheduler(cache, config, clock=clock), cache, clock, config)


def rows(step: Step) -> tuple[PrefillChunk | DecodeRow, ...]:
    return (*step.prefills, *step.decodes)


def gives_token(row: PrefillChunk | DecodeRow) -> bool:
    return isinstance(row, DecodeRow) or row.yields_token
