"""What a scheduler decides, case by case."""

import pytest
from scheduler_helpers import PAGE, World, world

from sevenfold.engine.request import Request, Status
from sevenfold.engine.scheduler import QueueFullError, Step, WaitReason


def spans(chunks: object) -> list[tuple[str, int, int]]:
    return [(chunk.request.id, chunk.first, chunk.end) for chunk in chunks]


def drafts(step: Step) -> list[tuple[Request, int]]:
    return [(row.request, row.draft_tokens) for row in step.decodes]


def test_a_prompt_is_computed_by_chunks_and_then_token_by_token() -> None:
    w = world(max_step_tokens=40)
    request = w.submit(90, max_tokens=3)
    chunks = [spans(w.step().prefills)[0][1:] for _ in range(3)]
    assert chunks == [(0, 40), (40, 80), (80, 90)]
    assert (request.status, request.generated) == (Status.DECODING, [7])
    assert [[row.request for row in w.step().decodes] for _ in range(2)] == [[request]] * 2
    assert (request.status, request.finish_reason) == (Status.ENDED, "length")
    assert request.num_computed_tokens == 92
    assert w.step().ended == (request,)
    assert not w.scheduler.has_work


def test_a_chunk_ends_on_a_page_or_with_the_prompt() -> None:
    w = world(max_step_tokens=43)
    w.submit(90)
    assert [(c.first, c.end, c.yields_token) for c in w.step().prefills] == [(0, 40, False)]


def test_decoding_and_prefill_share_a_step() -> None:
    w = world()
    first = w.submit(10)
    w.step()
    second = w.submit(200)
    step = w.step()
    assert [row.request for row in step.decodes] == [first]
    assert spans(step.prefills) == [(second.id, 0, 60)]  # 64 - 1, down to a page's border
    assert step.num_tokens == 61


def test_each_open_prompt_advances_and_the_first_gets_the_rest() -> None:
    w = world()
    long, other, short = w.submit(200), w.submit(100), w.submit(10)
    step = w.step()
    assert spans(step.prefills) == [(long.id, 0, 48), (other.id, 0, 8), (short.id, 0, 8)]
    step = w.step()
    assert spans(step.prefills) == [(long.id, 48, 100), (other.id, 8, 16), (short.id, 8, 10)]


def test_where_nothing_decodes_the_first_prompt_gets_a_longer_chunk() -> None:
    w = world(num_pages=200, lone_chunk_tokens=150)
    long, other = w.submit(400), w.submit(100, max_tokens=2)
    step = w.step()
    assert spans(step.prefills) == [(long.id, 0, 148), (other.id, 0, 8)]
    w.scheduler.cancel(long.id)
    step = w.step()  # no longer than a step anyway: it has the budget alone
    assert spans(step.prefills) == [(other.id, 8, 100)]
    late = w.submit(400)
    step = w.step()
    assert [row.request for row in step.decodes] == [other]
    assert spans(step.prefills) == [(late.id, 0, 60)]
    assert spans(w.step().prefills) == [(late.id, 60, 208)]


def test_a_longer_chunk_is_no_less_than_a_step() -> None:
    rule = "lone_chunk_tokens must be at least max_step_tokens = 64, got 63"
    with pytest.raises(ValueError, match=rule):
        world(lone_chunk_tokens=63)


def test_prompts_done_in_one_step_keep_its_limit() -> None:
    w = world(max_step_tokens=40)
    for _ in range(12):
        w.submit(8)
    assert [w.step().num_tokens for _ in range(3)] == [40, 37, 33]  # prompts: 5, 4, 3
    assert w.scheduler.num_waiting == 0


def test_prompts_done_in_one_step_are_not_counted_as_long() -> None:
    w = world(max_prefills=1)
    for _ in range(7):
        w.submit(8)
    assert len(w.step().prefills) == 7


def test_long_prompts_are_limited() -> None:
    w = world(max_prefills=2)
    for _ in range(3):
        w.submit(50)
    assert (len(w.step().prefills), w.scheduler.num_waiting) == (2, 1)


def test_rows_are_limited() -> None:
    w = world(max_running=2)
    for _ in range(3):
        w.submit(4, max_tokens=2)
    assert (w.scheduler.num_prefilling, w.scheduler.num_decoding) == (0, 0)
    w.step()
    assert (w.scheduler.num_waiting, w.scheduler.num_decoding) == (1, 2)
    assert len(w.step().prefills) == 0
    assert len(w.step().prefills) == 1


@pytest.mark.parametrize(
    ("limits", "prompt", "reason"),
    [
        ({"max_prefills": 1}, 50, WaitReason.MAX_PREFILLS),
        ({"max_running": 1}, 8, WaitReason.MAX_RUNNING),
        ({"max_step_tokens": 40, "max_prefills": 2}, 8, WaitReason.MAX_STEP_TOKENS),
        ({"num_pages": 4}, 16, WaitReason.MEMORY),
        ({"num_states": 1}, 16, WaitReason.MEMORY),
    ],
)
def test_why_requests_wait(limits: dict[str, int], prompt: int, reason: WaitReason) -> None:
    w = world(**limits)
    for _ in range(6):
        w.submit(prompt, max_tokens=1)
    assert w.scheduler.waits_for is WaitReason.TURN
    told = [(w.scheduler.waits_for, w.scheduler.num_waiting) for _ in w.steps()]
    assert {waits_for for waits_for, num_waiting in told if num_waiting} == {reason}
    assert told[-1] == (WaitReason.TURN, 0)


def test_what_had_to_make_room_waits_for_memory() -> None:
    w = world(num_pages=4, num_states=4)
    w.submit(7, max_tokens=6)
    w.submit(7, max_tokens=6)
    while not w.step().preempted:
        assert w.scheduler.num_waiting == 0
    assert (w.scheduler.num_waiting, w.scheduler.waits_for) == (1, WaitReason.MEMORY)
    w.step()
    assert (w.scheduler.num_waiting, w.scheduler.waits_for) == (1, WaitReason.MEMORY)


def test_drafts_are_counted_and_never_pass_max_tokens() -> None:
    w = world()
    request = w.submit(4, max_tokens=4, draft_tokens=8)
    w.scheduler.step()
    w.scheduler.record(request, [5])
    step = w.scheduler.step()
    assert drafts(step) == [(request, 2)]
    assert step.num_tokens == 3
    w.scheduler.record(request, [6, 7])
    assert (request.num_computed_tokens, request.num_tokens) == (6, 7)
    assert drafts(w.scheduler.step()) == [(request, 0)]


def test_drafts_leave_open_prompts_their_share() -> None:
    w = world(max_step_tokens=42, max_running=2, max_prefills=2)
    decoding = w.submit(4, max_tokens=100, draft_tokens=60)
    w.step()
    prompt = w.submit(50)
    step = w.step()
    assert drafts(step) == [(decoding, 33)]
    assert spans(step.prefills) == [(prompt.id, 0, 8)]


def test_drafts_never_cost_another_its_memory() -> None:
    w = world(num_pages=3)
    speculating, other = w.submit(4, 6, draft_tokens=5), w.submit(3, 2)
    w.step()
    step = w.step()
    assert step.preempted == ()
    assert drafts(step) == [(speculating, 3), (other, 0)]  # one free page of four


def test_drafts_may_be_asked_for_and_left_out_between_steps() -> None:
    w = world()
    request = w.submit(4, max_tokens=50)
    w.step()
    assert drafts(w.step()) == [(request, 0)]
    request.draft_tokens = 3
    assert drafts(w.step()) == [(request, 3)]


def test_places_of_the_next_step_are_taken_if_memory_has_them() -> None:
    w = world(num_pages=5, num_states=4)
    first, last = w.submit(7, max_tokens=6), w.submit(7, max_tokens=6)
    w.step()
    assert w.scheduler.reserve(first, 8)
    assert w.cache.pages == {first: 2, last: 2}
    assert w.scheduler.reserve(first, 9)
    assert w.cache.pages == {first: 3, last: 2}
    assert not w.scheduler.reserve(last, 9)
    assert w.cache.pages == {first: 3, last: 2}
    assert len(w.step().preempted) == 0
    waiting = w.submit(10)
    with pytest.raises(ValueError, match=f"request must be open, got '{waiting.id}', which is"):
        w.scheduler.reserve(waiting, 8)


def test_requests_in_the_order_of_rank() -> None:
    w = world()
    usual, urgent, late = w.submit(5), w.submit(5, priority=2), w.submit(5)
    w.step()
    assert w.scheduler.in_order([late, usual, urgent]) == [urgent, usual, late]
    stranger = Request("stranger", (1,), 1)
    with pytest.raises(ValueError, match="request must be under way, got 'stranger'"):
        w.scheduler.in_order([stranger])


def test_the_last_in_rank_gives_its_memory_and_waits() -> None:
    w = world(num_pages=4, num_states=4)
    first, last = w.submit(7, max_tokens=6), w.submit(7, max_tokens=6)
    w.step()
    w.step()  # both hold eight tokens: two pages
    step = w.step()
    assert (step.preempted, [row.request for row in step.decodes]) == ((last,), [first])
    assert (last.status, last.num_computed_tokens) == (Status.WAITING, 0)
    # It comes back when the other has ended: its kept pages spare eight tokens.
    later = [spans(step.prefills) for step in w.steps()]
    assert [(last.id, 8, 9)] in later
    assert (last.finish_reason, len(last.generated), last.num_preemptions) == ("length", 6, 1)
    assert w.scheduler.num_recomputed_tokens == 0
    assert last.num_cached_tokens == 0


def test_a_prompt_being_computed_may_be_the_last_in_rank() -> None:
    w = world(num_pages=7, max_step_tokens=8, max_running=2, max_prefills=1, min_chunk_tokens=4)
    first = w.submit(4, 9)
    w.step()
    last = w.submit(20)
    while first.num_computed_tokens < 8:
        assert last in [row.request for row in w.step().prefills]
    step = w.step()
    assert (step.preempted, drafts(step)) == ((last,), [(first, 0)])


def test_lost_tokens_are_counted() -> None:
    w = world(num_pages=4)
    w.submit(7, max_tokens=6)
    last = w.submit(7, max_tokens=6)
    w.step()
    w.step()
    w.step()
    assert last.status is Status.WAITING
    w.cache.kept.clear()
    list(w.steps())
    assert (w.scheduler.num_preemptions, w.scheduler.num_recomputed_tokens) == (1, 8)


def test_headroom_is_found_before_a_request_is_opened() -> None:
    w = world(num_pages=5, headroom_tokens=5)
    w.submit(7, max_tokens=6)  # 12 tokens: three pages
    w.submit(7, max_tokens=6)
    w.step()
    assert (w.scheduler.num_decoding, w.scheduler.num_waiting) == (1, 1)
    assert all(not step.preempted for step in w.steps())


def test_headroom_doubles_with_each_preemption() -> None:
    w = world(num_pages=7, headroom_tokens=4)
    _, last = w.submit(7, 20), w.submit(7, 20)
    w.step()
    assert w.cache.pages[last] == 3  # 7 + 4 tokens
    while last.num_preemptions == 0:
        w.step()
    w.cache.num_pages = 20
    while last.status is Status.WAITING:
        w.step()
    assert (last.num_tokens, w.cache.pages[last]) == (14, 6)  # opened with 13 tokens and 8 more


def test_memory_that_did_not_suffice_is_not_asked_again_before_some_is_freed() -> None:
    w = world(num_pages=4)
    w.submit(8, max_tokens=9)
    w.submit(16, max_tokens=1)
    calls = []
    for _ in range(8):
        w.step()
        calls.append(w.cache.calls["open"])
    assert calls == [2, 3, 3, 3, 3, 3, 3, 3]  # again after the first prompt was computed
    w.step()
    w.step()
    assert w.cache.calls["open"] == 4


def test_nobody_overtakes_a_request_that_needs_much() -> None:
    w = world(num_pages=4)
    running, large, small = w.submit(8, 6), w.submit(16, 1), w.submit(1, 1)
    w.step()
    assert (large.status, small.status) == (Status.WAITING, Status.WAITING)
    opened = [row.request for step in w.steps() for row in step.prefills]
    assert opened == [large, small]
    assert running.num_preemptions == 0


def test_priority_goes_first_and_the_same_priority_in_turn() -> None:
    w = world(max_running=1)
    low, high, higher, low2 = (w.submit(4, 1, priority=p) for p in (0, 1, 2, 0))
    order = [row.request for step in w.steps() for row in step.prefills]
    assert order == [higher, high, low, low2]


def test_waiting_outweighs_priority_in_the_end() -> None:
    w = world(max_running=1, ageing_s=10.0)
    low = w.submit(4, 1)
    w.clock.now_s += 19.0
    before = w.submit(4, 1, priority=2)
    w.clock.now_s += 2.0
    after = w.submit(4, 1, priority=2)
    order = [row.request for step in w.steps() for row in step.prefills]
    assert order == [before, low, after]


def test_no_stream_of_urgent_requests_starves_another() -> None:
    w = world(max_running=1, ageing_s=10.0)
    low = w.submit(4, 1)
    for _ in range(60):
        w.submit(4, 1, priority=3)
        w.step()
        w.clock.now_s += 1.0
        if low.status is Status.ENDED:
            break
    # Those that came within 3 * 10 s of it went before it, and no other.
    assert w.clock.now_s == pytest.approx(131.0)


@pytest.mark.parametrize("limits", [{"num_states": 2}, {"max_running": 2}, {"num_pages": 6}])
def test_priority_takes_memory_from_a_lower_one(limits: dict[str, int]) -> None:
    w = world(**limits)
    first, last = w.submit(8, 4), w.submit(8, 4)
    w.step()
    urgent = w.submit(9, 2, priority=1)
    step = w.step()
    assert (step.preempted, [row.request for row in step.decodes]) == ((last,), [first])
    assert [row.request for row in step.prefills] == [urgent]
    list(w.steps())
    assert {r.finish_reason for r in (first, last, urgent)} == {"length"}


def test_priority_takes_the_turn_of_a_long_prompt() -> None:
    w = world(max_prefills=1)
    long = w.submit(200)
    w.step()
    urgent = w.submit(50, priority=1)
    step = w.step()
    assert (step.preempted, spans(step.prefills)) == ((long,), [(urgent.id, 0, 50)])


def test_equal_priority_takes_nothing() -> None:
    w = world(num_states=1)
    running = w.submit(8, 4)
    w.step()
    w.submit(8, 4)
    assert [w.step().preempted for _ in range(3)] == [()] * 3
    assert running.status is Status.ENDED


def test_age_protects_from_priority() -> None:
    w = world(num_states=1, ageing_s=10.0)
    old = w.submit(8, 4)
    w.step()
    w.clock.now_s += 11.0
    w.submit(8, 4, priority=1)
    assert w.step().preempted == ()
    assert old.num_preemptions == 0


def test_a_preempted_request_stays_out_until_another_ends() -> None:
    w = world(num_pages=5)
    _, ends_first, last = w.submit(4, 16), w.submit(4, 6), w.submit(4, 9)
    w.step()
    assert w.step().preempted == (last,)
    w.cache.num_pages = 50  # room enough now; but what was too little may be so again
    returns = next(step for step in w.steps() if step.prefills)
    assert [row.request for row in returns.prefills] == [last]
    assert returns.ended == (ends_first,)


def cancel(w: World, request: Request) -> str:
    assert w.scheduler.cancel(request.id)
    return "cancelled"


def let_pass(w: World, request: Request) -> str:
    w.clock.now_s = 110.0
    return "deadline"


@pytest.mark.parametrize("end", [cancel, let_pass])
@pytest.mark.parametrize("num_steps", [0, 1, 5])  # waiting, prefilling, decoding
def test_what_ends_early_frees_its_memory_for_the_same_step(end: object, num_steps: int) -> None:
    w = world(num_pages=60, num_states=1)
    request = w.submit(200, 9, deadline_s=110.0)
    for _ in range(num_steps):
        w.step()
    other = w.submit(40, 1)
    reason = end(w, request)
    step = w.step()
    assert (request.finish_reason, step.ended) == (reason, (request,))
    assert [row.request for row in step.prefills] == [other]
    assert request not in w.cache.pages
    # What was computed stays for whoever asks again.
    assert (request.prompt[:PAGE] in w.cache.kept[b""]) == (num_steps > 0)


def test_a_deadline_is_not_early() -> None:
    w = world()
    request = w.submit(4, 50, deadline_s=110.0)
    w.clock.now_s = 109.0
    w.step()
    assert request.status is Status.DECODING


def test_cancelling_what_has_ended_does_nothing() -> None:
    w = world()
    request = w.submit(4, 1)
    assert w.scheduler.cancel(request.id)
    w.step()
    assert not w.scheduler.cancel(request.id)
    assert not w.scheduler.cancel("unknown")


def test_an_id_may_be_used_again_and_is_not_cancelled_by_an_old_wish() -> None:
    w = world()
    request = w.submit(4, 1)
    step = w.scheduler.step()
    w.scheduler.cancel(request.id)
    w.scheduler.record(step.prefills[0].request, [1])
    assert request.finish_reason == "length"
    again = Request(request.id, (1, 2), 3)
    w.scheduler.submit(again)
    w.step()
    assert again.status is Status.DECODING


def test_a_request_that_stops_frees_its_memory_and_leaves_its_prefix() -> None:
    w = world()
    request = w.submit(9, 50)
    w.step()
    w.scheduler.step()
    w.scheduler.record(request, [3], stopped=True)
    assert (request.finish_reason, request.generated) == ("stop", [7, 3])
    assert list(w.cache.pages) == [request]  # until its token is on its way
    w.scheduler.let_go()
    assert w.cache.pages == {}
    follower = w.submit((*request.prompt, 7, 3, 4, 4), 5)
    assert spans(w.step().prefills) == [(follower.id, 8, 13)]
    assert follower.num_cached_tokens == 8


def test_salt_keeps_prefixes_apart() -> None:
    w = world()
    w.submit(range(9), 1, salt=b"a")
    w.step()
    stranger, friend = w.submit(range(9), 1, salt=b"b"), w.submit(range(9), 1, salt=b"a")
    assert spans(w.step().prefills) == [(stranger.id, 0, 9), (friend.id, 8, 9)]


def test_a_failing_request_fails_alone() -> None:
    w = world()
    bad, good = w.submit(4, 5), w.submit(4, 5)
    w.scheduler.step()
    w.scheduler.fail(bad, "logits must be finite, got nan")
    w.scheduler.record(good, [1])
    assert bad not in w.cache.pages
    assert w.cache.kept[b""] == set()
    step = w.step()
    assert (step.ended, [row.request for row in step.decodes]) == ((bad,), [good])
    assert (bad.finish_reason, bad.error) == ("error", "logits must be finite, got nan")


def test_snapshots_are_asked_for_chunk_by_chunk() -> None:
    w = world(max_step_tokens=40)
    w.submit(70, marks=(8, 40, 41, 70))
    assert [w.step().prefills[0].snapshots for _ in range(2)] == [(8, 40), (41, 70)]


def test_snapshots_are_asked_for_in_decoding_too() -> None:
    w = world()
    request = w.submit(4, max_tokens=20, draft_tokens=3)
    w.step()
    w.scheduler.step()
    w.scheduler.record(request, [5, 6])
    row = w.scheduler.step().decodes[0]
    assert (request.num_computed_tokens, row.draft_tokens, row.snapshots) == (6, 3, (8,))


def test_the_cache_is_asked_once_a_page() -> None:
    w = world()
    w.submit(PAGE, max_tokens=8 * PAGE + 1)
    list(w.steps())
    assert w.cache.calls == {"open": 1, "extend": 9, "snapshots_due": 9}


def test_memory_that_breaks_its_promise_fails_a_request_and_goes_on() -> None:
    w = world(num_pages=8)
    w.cache.num_pages = 4
    large, small = w.submit(20, 1), w.submit(4, 1)
    list(w.steps())
    assert (large.finish_reason, small.finish_reason) == ("error", "length")
    assert large.error is not None
    assert "memory must hold 20 tokens" in large.error


def test_a_request_alone_gives_up_its_prefix_too() -> None:
    w = world(num_pages=8)
    request = w.submit(8, max_tokens=20)
    w.step()
    w.cache.num_pages = 2
    step = w.step()
    assert (step.preempted, step.prefills, step.decodes) == ((request,), (), ())
    assert w.cache.kept[b""] == set()
    w.cache.num_pages = 3
    assert spans(w.step().prefills) == [(request.id, 0, 9)]


def test_memory_that_shrinks_does_not_hang() -> None:
    w = world(num_pages=8)
    request = w.submit(8, max_tokens=20)
    w.step()
    w.cache.num_pages = 2
    list(w.steps())
    assert (request.finish_reason, request.num_preemptions) == ("error", 1)


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    w = world(num_pages=8)
    w.submit(20, 13)
    with pytest.raises(ValueError, match=r"at most 32 tokens.*got 20 \+ 14 - 1 = 33; lower max_to"):
        w.submit(20, 14)
    with pytest.raises(ValueError, match=r"got 33 \+ 1 - 1 = 33; shorten the prompt"):
        w.submit(33, 1)


def test_length_may_cost_no_memory() -> None:
    w = world(num_pages=1, max_request_tokens=None)
    assert w.submit(300, 10**6).status is Status.WAITING


def test_a_full_queue_refuses() -> None:
    w = world(max_waiting=2)
    first, _ = w.submit(4), w.submit(4)
    with pytest.raises(QueueFullError, match="at most max_waiting = 2, got one more"):
        w.submit(4)
    w.scheduler.cancel(first.id)
    w.step()
    w.submit(4)


def test_a_request_is_submitted_once() -> None:
    w = world()
    request = w.submit(4, 1)
    with pytest.raises(ValueError, match="request must be new"):
        w.scheduler.submit(request)
    with pytest.raises(ValueError, match="an id of its own"):
        w.scheduler.submit(Request(request.id, (1,), 1))
    list(w.steps())
    with pytest.raises(ValueError, match="request must be new"):
        w.scheduler.submit(request)


def test_every_row_is_recorded_once_and_before_the_next_step() -> None:
    w = world()
    request, other = w.submit(4, 5), Request("other", (1,), 1)
    with pytest.raises(ValueError, match="request must have an unrecorded row"):
        w.scheduler.record(request, [1])
    w.scheduler.step()
    with pytest.raises(RuntimeError, match="every row must be recorded"):
        w.scheduler.step()
    with pytest.raises(ValueError, match="request must have an unrecorded row"):
        w.scheduler.record(other, [1])
    with pytest.raises(ValueError, match="request must be under way"):
        w.scheduler.fail(other, "no")
    w.scheduler.record(request, [1])
    with pytest.raises(ValueError, match="request must have an unrecorded row"):
        w.scheduler.record(request, [1])


@pytest.mark.parametrize(("num_tokens", "rule"), [(0, "1 to 3"), (4, "1 to 3")])
def test_a_row_gives_one_token_and_its_accepted_drafts(num_tokens: int, rule: str) -> None:
    w = world()
    request = w.submit(4, 9, draft_tokens=2)
    w.step()
    w.scheduler.step()
    with pytest.raises(ValueError, match=f"new_tokens must have {rule} tokens"):
        w.scheduler.record(request, [1] * num_tokens)


def test_an_unfinished_prompt_gives_no_token() -> None:
    w = world()
    request = w.submit(100)
    w.scheduler.step()
    with pytest.raises(ValueError, match="new_tokens must have 0 to 0 tokens"):
        w.scheduler.record(request, [1])
    with pytest.raises(ValueError, match="stopped must be False without a new token"):
        w.scheduler.record(request, [], stopped=True)


def test_limits_leave_room_for_decoding_and_prefill() -> None:
    with pytest.raises(ValueError, match=r"max_step_tokens must be at least .* 16 \+ 3 \* 8 = 40"):
        world(max_step_tokens=39)
    with pytest.raises(ValueError, match="min_chunk_tokens must be a multiple of page_tokens = 4"):
        world(min_chunk_tokens=6)
