"""A naive model of scheduling: who was submitted, and which of whose tokens were computed."""

from random import Random

from scheduler_helpers import PAGE, gives_token, rows, snapshots, world

from sevenfold.engine.request import Request, Status
from sevenfold.engine.scheduler import DecodeRow, QueueFullError, Step

OUTCOMES = {"go on": 94, "stop": 3, "fail": 1, "cancel": 2}


class Model:
    """Does what a caller does, and checks everything that a scheduler answers."""

    def __init__(self, limits: dict[str, float]) -> None:
        self.world = world(**limits)
        self.world.cache.when_open = self.check_turn
        self.world.cache.when_close = lambda request: self.computed.pop(request)
        self.under_way: list[Request] = []
        self.ended: list[Request] = []
        self.cancelled: set[str] = set()
        self.keys: dict[Request, tuple[float, int]] = {}
        self.computed: dict[Request, int] = {}
        self.begun: dict[Request, int] = {}
        self.fresh: set[Request] = set()
        self.leaving: set[Request] = set()  # ended by a token, and hold memory until the next step

    def submit(self, prompt, max_tokens, priority, patience, salt, drafts) -> None:
        w, now_s = self.world, self.world.clock.now_s
        fits = len(prompt) + max_tokens - 1 <= w.config.max_request_tokens
        room = w.scheduler.num_waiting < w.config.max_waiting
        due = None if patience is None else now_s + patience
        try:
            request = w.submit(
                prompt,
                max_tokens,
                priority=priority,
                deadline_s=due,
                salt=salt,
                draft_tokens=drafts,
                marks=(len(prompt),),
            )
        except QueueFullError:
            assert fits
            assert not room
        except ValueError:
            assert not fits
        else:
            assert fits
            assert room
            self.under_way.append(request)
            key = (now_s - priority * w.config.ageing_s, len(self.keys))
            self.keys[request] = key

    def cancel(self, request: Request) -> None:
        known = request.status is not Status.ENDED
        assert self.world.scheduler.cancel(request.id) == known
        if known:
            self.cancelled.add(request.id)

    def step(self, random: Random) -> None:
        step = self.checked_step()
        for row in step.decodes:
            if random.random() < 0.3:
                self.reserve(row.request)
        for row in rows(step):
            self.outcome(row, random)
        self.nobody_is_lost()
        if random.random() < 0.3:
            self.world.scheduler.let_go()
            self.leaving.clear()
            self.nobody_is_lost()

    def reserve(self, request: Request) -> None:
        """Ask for the places of the next step, before this one is recorded."""
        if request.num_remaining_tokens > 1:
            before, need = self.world.cache.pages[request], request.num_computed_tokens + 2
            held = self.world.scheduler.reserve(request, need)
            after = self.world.cache.pages[request]
            assert after == max(before, -(-need // PAGE)) if held else after == before

    def outcome(self, row, random: Random) -> None:
        request, scheduler = row.request, self.world.scheduler
        (what,) = random.choices(list(OUTCOMES), OUTCOMES.values())
        if what == "fail":
            scheduler.fail(request, "its own fault")
            assert request.finish_reason == "error"
            return
        if what == "cancel":
            self.cancel(request)
        drafts = row.draft_tokens if isinstance(row, DecodeRow) else 0
        accepted = random.randint(0, drafts)
        tokens = [request.num_tokens + n for n in range(1 + accepted)] if gives_token(row) else []
        self.record(row, tokens, stopped=what == "stop" and bool(tokens))

    def record(self, row, tokens: list[int], *, stopped: bool) -> None:
        request = row.request
        first = self.computed[request]
        end = first + len(tokens) if isinstance(row, DecodeRow) else row.end
        self.computed[request] = end
        self.world.scheduler.record(request, tokens, stopped=stopped)
        assert request.num_computed_tokens == end
        over = len(request.generated) == request.max_tokens
        assert (request.status is Status.ENDED) == (stopped or over)
        if request.status is Status.ENDED:
            assert request.finish_reason == ("stop" if stopped else "length")
            self.leaving.add(request)

    def check_turn(self, request: Request, hit: int) -> None:
        """Nobody is opened before one that ranks ahead of it; what is opened is not open yet."""
        waiting = [r for r in self.under_way if r.status is Status.WAITING and r is not request]
        assert all(self.keys[request] < self.keys[other] for other in waiting)
        assert request not in self.computed
        self.computed[request] = hit
        self.fresh.add(request)

    def checked_step(self) -> Step:
        w = self.world
        before = {r: r.status for r in self.under_way}
        known = {r: r.num_tokens - r.num_computed_tokens for r in self.under_way}
        overdue = {r for r in self.under_way if (r.deadline_s or 1e9) <= w.clock.now_s}
        step = w.scheduler.step()
        self.leaving.clear()
        self.check_ends(step, overdue)
        self.check_work(step)
        self.check_victims(step, before)
        gone = {*step.preempted, *step.ended}
        in_step = {row.request: row for row in rows(step)}
        for request, status in before.items():
            if request in gone:
                assert request not in in_step
            elif status is Status.DECODING:
                assert isinstance(in_step[request], DecodeRow)
            elif status is Status.PREFILLING:
                chunk = in_step[request]
                assert chunk.end - chunk.first >= min(known[request], w.config.min_chunk_tokens)
        return step

    def check_victims(self, step: Step, before: dict[Request, Status]) -> None:
        """Memory goes from the last in rank to one ahead of it, who holds it or is more urgent."""
        gone = {*step.preempted, *step.ended}
        stayed = [r for r, s in before.items() if s is not Status.WAITING and r not in gone]
        opened = [chunk.request for chunk in step.prefills if chunk.request not in stayed]
        for victim in step.preempted:
            last = all(self.keys[r] < self.keys[victim] for r in stayed)
            urgent = [r for r in opened if r.priority > victim.priority]
            assert last or any(self.keys[r] < self.keys[victim] for r in urgent)
            assert stayed or opened or len(step.preempted) == 1  # alone in memory

    def check_ends(self, step: Step, overdue: set[Request]) -> None:
        for request in step.ended:
            assert request.status is Status.ENDED
            assert request not in self.world.cache.pages
            self.under_way.remove(request)
            self.ended.append(request)
        reasons = {request.id: request.finish_reason for request in self.ended}
        assert self.cancelled <= set(reasons)
        assert all(request in self.ended for request in overdue)

    def check_work(self, step: Step) -> None:
        w = self.world
        most, least = w.config.max_step_tokens, w.config.min_chunk_tokens
        if step.num_tokens > most:
            # The first prompt, where nothing decodes; it leaves the others what they must have.
            first, *others = (chunk.end - chunk.first for chunk in step.prefills)
            assert not step.decodes
            assert first <= (w.config.lone_chunk_tokens or 0)
            assert max(others, default=0) <= least
            assert sum(others) + least <= most
        assert len({row.request for row in rows(step)}) == len(rows(step))
        for chunk in step.prefills:
            request, first = chunk.request, self.computed[chunk.request]
            assert chunk.first == request.num_computed_tokens == first < chunk.end
            if request in self.fresh:  # it begins anew after a preemption, and never else
                self.begun[request] = self.begun.get(request, 0) + 1
                self.fresh.remove(request)
            assert self.begun[request] == 1 + request.num_preemptions
            assert chunk.yields_token == (chunk.end == request.num_tokens)
            assert chunk.yields_token or chunk.end % PAGE == 0
            assert chunk.snapshots == tuple(snapshots(request, first, chunk.end))
        for request, drafts, places in step.decodes:
            first = request.num_computed_tokens
            assert places == tuple(snapshots(request, first, first + 1 + drafts))
            assert self.computed[request] == request.num_computed_tokens == request.num_tokens - 1
            assert 0 <= drafts <= min(request.draft_tokens, request.num_remaining_tokens - 1)
            assert request.num_tokens + drafts <= w.cache.pages[request] * PAGE

    def nobody_is_lost(self) -> None:
        w, alive = self.world, [r for r in self.under_way if r.status is not Status.ENDED]
        counts = (w.scheduler.num_waiting, w.scheduler.num_prefilling, w.scheduler.num_decoding)
        expected = (Status.WAITING, Status.PREFILLING, Status.DECODING)
        assert counts == tuple(sum(r.status is s for r in alive) for s in expected)
        opened = {r for r in alive if r.status is not Status.WAITING}
        assert set(w.cache.pages) == opened | self.leaving
        assert set(self.computed) == set(w.cache.pages)
        assert w.cache.num_free >= 0
        assert w.scheduler.has_work == bool(self.under_way)
        assert len(set(self.ended)) == len(self.ended)

    def drain(self) -> None:
        """Whatever the history, everybody comes to an end, and nothing stays behind."""
        tokens = sum(r.num_tokens + r.num_remaining_tokens for r in self.under_way)
        most = 4 + tokens * (1 + len(self.under_way))
        for _ in range(most):
            if not self.world.scheduler.has_work:
                break
            for row in rows(self.checked_step()):
                self.record(row, [0] if gives_token(row) else [], stopped=False)
            self.nobody_is_lost()
        assert self.under_way == []
        assert self.world.cache.pages == {}
        faults = {r.error for r in self.ended} - {None, "its own fault"}
        assert faults == set()
        reasons = {r.id: r.finish_reason for r in self.ended}
        assert len(reasons) == len(self.keys)
