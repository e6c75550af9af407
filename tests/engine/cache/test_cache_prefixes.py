"""What later requests find: chats, branches, salts, evictions."""

import pytest
from cache_helpers import FULL, HYBRID, LINEAR, P, Runner, blocks, tiny_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.engine.cache import CacheManager, MissReason
from sevenfold.engine.cache.lookup import SeenKeys
from sevenfold.engine.memory_layout import Tenant


def runner(num_slabs: int = 100, **options) -> Runner:
    return Runner(CacheManager(tiny_plan(num_slabs, **options), headroom_tokens=0))


def reason(run: Runner, prompt: tuple[int, ...], **options) -> MissReason | None:
    """Why a prompt misses now; None on a hit."""
    request = run.request(prompt, **options)
    assert run.start(request) is not None
    found = run.manager.lookup(request)
    run.finish(request, keep=False)
    return found.reason


WORDS = st.lists(st.integers(1, 5), min_size=1, max_size=150).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    system=WORDS,
    turns=st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=4),
    layers=st.sampled_from([HYBRID, (LINEAR,), (FULL,)]),
    dtype=st.sampled_from(["fp32", "fp16", "int8"]),
)
def test_every_later_turn_of_a_chat_hits(system, turns, layers, dtype) -> None:
    run = runner(300, layer_types=layers, snapshot_dtype=dtype, head_dim=64)
    history, marks, last = system, [len(system)], 0
    for user, answer in turns:
        history += user
        marks.append(len(history))
        prompt = (*history, 6)  # the generation prompt: one token
        hit = run.serve(prompt, marks=tuple(marks), output=answer)
        # Whatever the turn before left whole: up to its generation prompt at least.
        assert hit >= last
        assert hit <= len(prompt) - 1
        last = len(history) // P * P
        history += (6, *answer)
        marks.append(len(history))
    run.check_nothing_is_left()


def test_a_chat_that_keeps_its_answers_goes_on_from_the_end_of_the_output() -> None:
    run = runner()
    first = blocks("ab")
    run.serve(first, marks=(P, 2 * P), output=blocks("cdefghijk"))
    # 11 blocks are known, the last token is not computed; decoding keeps its state every 64.
    assert run.serve((*first, *blocks("cdefghijkx"))) == 8 * P
    # The one before it was replaced, and so was found no more.
    assert run.serve((*first, *blocks("cdx"))) == 2 * P


def test_a_template_that_drops_reasoning_goes_on_from_before_the_generation_prompt() -> None:
    run = runner()
    run.serve((*blocks("abcd"), 6, 6), marks=(P, 4 * P), output=blocks("zzzz"))
    assert run.serve((*blocks("abcd"), *blocks("ef"))) == 4 * P


@pytest.mark.parametrize("tail", [1, 7, P])
def test_64_shared_tokens_are_enough(tail: int) -> None:
    run = runner()
    run.serve((*blocks("abcd"), *blocks("x")[:tail]), marks=(4 * P,))
    assert run.serve((*blocks("abcd"), *blocks("yz"))) == 4 * P


def test_the_third_request_hits_where_the_second_branched_off() -> None:
    run = runner()
    run.serve(blocks("abcdef"))
    assert reason(run, blocks("abcxyz")) is MissReason.NO_STATE
    assert run.serve(blocks("abcxyz")) == 0
    assert run.serve(blocks("abcq")) == 3 * P
    counters = run.manager.counters()
    assert (counters.num_hits, counters.hit_tokens, counters.missed_tokens) == (1, 3 * P, 3 * P)
    assert counters.misses == {"no_kv": 1, "no_state": 1}
    assert counters.query_tokens == (6 + 6 + 4) * P


def test_a_branch_is_found_by_keys_whose_pages_are_gone() -> None:
    run = runner()
    run.serve(blocks("abcdef"))
    run.manager.clear()
    assert reason(run, blocks("abcxyz")) is MissReason.EVICTED
    run.serve(blocks("abcxyz"))
    assert run.serve(blocks("abcq")) == 3 * P


def test_a_client_s_mark_gets_the_first_hit() -> None:
    run = runner()
    run.serve(blocks("abcdef"), marks=(3 * P + 5,))
    assert run.serve(blocks("abcxyz")) == 3 * P


def test_a_request_that_runs_is_found_by_others() -> None:
    run = runner()
    running, other = run.request(blocks("abcd")), run.request((*blocks("abc"), 9))
    run.start(running)
    run.prefill(running)
    running.generated.append(1)
    assert run.start(other) == 3 * P
    pages = run.manager.pages(running)[:3]
    assert run.manager.pages(other)[:3] == pages
    run.finish(running, keep=False)
    # Its pages stay as long as the other needs them.
    run.check()
    assert run.manager.pages(other)[:3] == pages
    run.check_nothing_is_left()


def test_what_is_being_computed_is_found_by_nobody() -> None:
    run = runner()
    running, other = run.request(blocks("abcd")), run.request(blocks("abcd"))
    run.start(running)
    assert run.manager.extend(running, 4 * P)
    assert run.manager.snapshots_due(running, 0, 4 * P) == [3 * P]
    assert run.start(other) == 0


@pytest.mark.parametrize("layers", [HYBRID, (FULL,), (LINEAR,)])
def test_salts_share_nothing_and_their_callers_do_not_learn_it(layers) -> None:
    run = runner(layer_types=layers)
    run.serve(blocks("abcd"), salt=b"one")
    request = run.request(blocks("abcd"), salt=b"other")
    assert run.start(request) == 0
    found = run.manager.lookup(request)
    assert found.reason is MissReason.OTHER_SALT
    assert found.public_reason is MissReason.NO_KV
    assert found.seen_tokens == 0
    run.prefill(request)
    run.finish(request)
    assert run.serve(blocks("abcd"), salt=b"one") == 3 * P


def test_a_miss_says_why() -> None:
    run = runner()
    assert reason(run, blocks("a")) is MissReason.TOO_SHORT
    assert reason(run, blocks("ab")) is MissReason.NO_KV
    run.serve(blocks("ab"))
    assert reason(run, (*blocks("a"), 1)) is None
    assert reason(run, (*blocks("b"), 1)) is MissReason.NO_KV


def test_what_failed_is_not_found_again() -> None:
    run = runner()
    request = run.request(blocks("abcd"), marks=(2 * P,))
    run.start(request)
    run.prefill(request)
    assert run.manager.extend(request, 5 * P)  # publishes what was computed
    run.finish(request, keep=False)
    assert sum(run.manager.usage().num_items) == 0
    assert reason(run, blocks("abcd")) is MissReason.EVICTED


def test_keys_and_values_that_no_state_reaches_are_dropped() -> None:
    run = runner()
    run.serve(blocks("abcdefgh"), marks=(2 * P,))
    # The blocks up to the prompt's end; the last could be found by nobody.
    assert run.manager.usage().num_items[Tenant.PAGE] == 7
    run.serve(blocks("abcdefgh"), output=blocks("xy"))
    assert run.manager.usage().num_items[Tenant.PAGE] == 7
    assert run.manager.usage().num_items[Tenant.SNAPSHOT] == 2


def test_a_model_without_linear_layers_goes_on_from_any_block() -> None:
    run = runner(layer_types=(FULL,))
    run.serve(blocks("abcdef"))
    assert run.serve(blocks("abcx")) == 3 * P
    assert run.serve(blocks("abcdefg")) == 6 * P
    assert run.manager.usage().num_items[Tenant.PAGE] == 8
    assert run.manager.usage().num_items[Tenant.SNAPSHOT] == 0


def test_a_model_without_linear_layers_loses_the_end_of_a_path_first() -> None:
    run = runner(41, layer_types=(FULL,))
    prompt = tuple(range(40 * P))
    run.serve(prompt)
    run.serve((50, *range(1, 8 * P)))
    # Anchors stand behind 16, 32 and 40 blocks: 8 blocks had to go.
    assert run.serve(prompt) == 32 * P


def test_what_is_used_stays_and_what_saves_more() -> None:
    run = runner(8)
    long, short = (*blocks("abcdefgh"), 1), (*blocks("x"), 1)
    run.serve(long)
    run.serve(short)
    # Slabs: a state, pages, and the long one's snapshot; the other prompts take turns.
    for letter in "mnopqrs":
        run.serve((*blocks(letter), 1))
        assert run.serve(long) == 8 * P
    assert reason(run, short) is MissReason.EVICTED
    assert run.manager.counters().num_evicted >= 4


def test_the_value_is_flops_saved_by_what_ends_with_it() -> None:
    run = runner()
    run.serve(blocks("abcdef"), marks=(2 * P, 6 * P))
    run.serve(blocks("abcxyz"), marks=(4 * P, 6 * P))
    plan, nodes = run.manager.plan, run.manager._tree._nodes.values()
    anchored = [node for node in nodes if node.anchor]
    above = {id(node): {id(node)} for node in nodes}
    for node in sorted(nodes, key=lambda node: node.num_tokens):
        above[id(node)] |= above[id(node.parent)] if node.parent else set()
    for node in anchored:
        others = [other for other in anchored if other is not node]
        kept = set().union(*(above[id(other)] for other in others))
        before = [other.num_tokens for other in others if id(other) in above[id(node)]]
        freed = plan.snapshot_bytes + len(above[id(node)] - kept) * plan.page_bytes
        saved = plan.cost.flops(node.num_tokens) - plan.cost.flops(max(before, default=0))
        assert run.manager._tree.value_of(node) == saved / freed
    # At 2, 6 of one path; at 2 (once), 3 (the branch), 4, 6 of the other.
    assert sorted(node.num_tokens // P for node in anchored) == [2, 3, 4, 6, 6]


def test_a_block_that_nobody_has_any_more_is_not_another_caller_s() -> None:
    run = runner()
    run.serve(blocks("ab"), salt=b"one")
    assert reason(run, blocks("ab"), salt=b"other") is MissReason.OTHER_SALT
    run.manager.clear()
    assert reason(run, blocks("ab"), salt=b"other") is MissReason.NO_KV


def test_what_is_used_again_and_again_outlives_what_is_worth_as_much() -> None:
    run = runner(8)
    hot = (*blocks("h"), 1)
    run.serve(hot)
    for letter in "abcdefgijklmnopq":
        run.serve((*blocks(letter), 1))
        assert run.serve(hot) == P
    assert run.manager.counters().num_evicted > 8


def test_of_keys_that_are_gone_the_latest_are_remembered() -> None:
    seen = SeenKeys(2)
    for key in (b"a", b"b", b"a", b"c"):
        seen.add(key)
    assert [key in seen for key in (b"a", b"b", b"c")] == [True, False, True]


def test_snapshots_that_are_good_to_have_evict_nothing_that_is_worth_more() -> None:
    run = runner(5)
    run.serve(tuple(range(9 * P)))
    request = run.request(blocks("x"))
    run.start(request)
    run.prefill(request)
    before = run.manager.counters()
    run.decode(request, tuple(range(100)))
    after = run.manager.counters()
    assert (before.num_evicted, before.num_refused_snapshots) == (0, 0)
    assert (after.num_evicted, after.num_refused_snapshots) == (0, 1)
    run.finish(request)
    assert run.serve(tuple(range(9 * P))) == 8 * P


def test_room_for_a_state_costs_the_snapshots_of_one_slab() -> None:
    run = runner(20, snapshot_dtype="int8", head_dim=64)
    assert run.manager.plan.layout.places[Tenant.SNAPSHOT] == 4
    for prompt in range(62):
        run.serve(tuple(range(100 * prompt, 100 * prompt + 2 * P)))
        # Used in another order than made: the least valuable are spread over all slabs.
        back = prompt * 7 % (prompt + 1)
        run.serve(tuple(range(100 * back, 100 * back + 2 * P)))
    before = run.manager.counters().num_evicted
    assert run.manager.usage().num_free_slabs == 1
    for prompt in range(2):
        assert run.start(run.request((7 + prompt,) * 3)) == 0
    assert 1 <= run.manager.counters().num_evicted - before <= 4


def test_a_snapshot_written_in_the_last_step_makes_room_for_others() -> None:
    run = runner(6)
    running, other = run.request(blocks("ab")), run.request(blocks("c"))
    assert run.start(running) == run.start(other) == 0
    assert run.manager.snapshots_due(running, 0, 2 * P) == [P]
    # Two states, the snapshot, and two slabs of pages, two of them the first request's.
    assert run.manager.extend(other, 14 * P)
    assert not run.manager.extend(other, 22 * P)
    running.num_computed_tokens = 2 * P
    assert run.manager.extend(other, 22 * P)
    run.finish(other, keep=False)
    run.finish(running)


def test_a_state_of_decoding_that_others_use_is_not_replaced() -> None:
    run = runner()
    running = run.request(blocks("ab"))
    run.start(running)
    run.prefill(running)
    run.decode(running, blocks("cdx"))
    assert run.serve(blocks("abcdef")) == 4 * P
    run.decode(running, blocks("xxxxx"))
    assert run.serve(blocks("abcdeg")) == 5 * P  # where the one before branched off
    assert run.serve(blocks("abcdh")) == 4 * P
    run.finish(running)


def test_of_requests_alike_one_writes_the_snapshot() -> None:
    run = runner()
    several = [run.request(blocks("abcd"), marks=(2 * P,)) for _ in range(4)]
    for request in several:
        assert run.start(request) == 0
    first, second, third, fourth = several
    assert run.manager.snapshots_due(first, 0, 4 * P) == [2 * P]
    assert run.manager.snapshots_due(second, 0, 4 * P) == []
    run.finish(first)  # before it was computed
    assert run.manager.snapshots_due(second, 0, 4 * P) == [2 * P]
    run.run(second, 4 * P, [2 * P])
    second.num_computed_tokens = 4 * P
    assert run.manager.extend(second, 4 * P + 1)
    # The tree has them now.
    assert run.manager.snapshots_due(third, 0, 4 * P) == []
    run.manager.clear()
    assert run.manager.snapshots_due(fourth, 0, 4 * P) == [2 * P]
    run.check_nothing_is_left()


def test_alone_a_request_fits_whatever_was_cached_before() -> None:
    run = runner(6)
    longest = run.manager.plan.longest_context_tokens
    assert longest == 4 * 8 * P
    for letter in "abcdefgh":
        run.serve(blocks(letter * 3))
    request = run.request(blocks("abc"), max_tokens=longest - 3 * P)
    assert run.start(request) is not None
    run.prefill(request)
    request.generated.extend([5] * (longest - 3 * P))
    assert run.compute(request, longest)
    run.check_nothing_is_left()


def test_what_was_found_makes_room_when_nothing_else_can() -> None:
    run = runner(4)
    run.serve(blocks("abcd"))
    longest = run.manager.plan.longest_context_tokens
    assert longest == 2 * 8 * P
    # A state, its snapshot and two slabs of pages are more than three slabs.
    request = run.request(blocks("abcd") + (7,) * (longest - 4 * P))
    assert run.start(request) == 0
    assert run.manager.lookup(request).reason is MissReason.NO_MEMORY
    run.prefill(request)
    run.check_nothing_is_left()


def test_a_request_that_does_not_fit_takes_and_evicts_nothing() -> None:
    run = runner(8)
    run.serve(blocks("zzzz"))
    holder = run.request(blocks("abcdefgh" * 3))
    assert run.start(holder) == 0
    pinned = run.manager.num_pinned_items()
    before = run.manager.usage(), run.manager.counters()
    assert run.start(run.request(blocks("q" * 40))) is None
    assert not run.manager.extend(holder, 60 * P)
    assert run.manager.num_pinned_items() == pinned
    assert (run.manager.usage(), run.manager.counters()) == before


def test_opening_takes_room_for_some_output_and_more_after_a_preemption() -> None:
    run = Runner(CacheManager(tiny_plan(100), headroom_tokens=40))
    request = run.request(blocks("ab"), max_tokens=75)
    for pages in (5, 7, 7):  # 40, 80 but no more than 74, and as many
        assert run.start(request) == 0
        assert len(run.manager.pages(request)) == pages
        run.finish(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1


def test_fresh_items_are_told_once() -> None:
    run = runner()
    request = run.request(blocks("ab"))
    run.manager.open(request)
    fresh = run.manager.take_fresh()
    assert fresh.states == [run.manager.placement(request).state]
    assert fresh.pages == list(run.manager.pages(request))
    assert len(fresh.pages) == 2
    again = run.manager.take_fresh()
    assert (again.states, again.pages) == ([], [])
    assert run.manager.extend(request, 3 * P)
    assert run.manager.take_fresh().pages == list(run.manager.pages(request, 2))
    run.manager.close(request, keep=False)
    run.serve(blocks("abc"))
    request = run.request(blocks("abc"))
    assert run.manager.open(request) == 2 * P
    # Its state is read from a snapshot, and two of its pages are cached ones.
    fresh = run.manager.take_fresh()
    assert (fresh.states, fresh.pages) == ([], list(run.manager.pages(request, 2)))


def test_a_snapshot_of_rejected_drafts_is_named_again() -> None:
    run = runner()
    request = run.request(blocks("abcd"))
    run.start(request)
    run.prefill(request)
    request.generated.extend(range(60))
    assert run.compute(request, 2 * 64 - 4)
    request.generated.extend([1, 2])
    assert run.manager.extend(request, 2 * 64 + 2)
    assert run.manager.snapshots_due(request, 2 * 64 - 4, 2 * 64 + 2) == [2 * 64]
    slots = run.manager.placement(request).snapshots
    request.num_computed_tokens = 2 * 64 - 2
    assert run.manager.snapshots_due(request, 2 * 64 - 2, 2 * 64 + 4) == [2 * 64]
    assert run.manager.placement(request).snapshots == slots
    run.finish(request)
    assert sum(run.manager.num_pinned_items()) == 0


def test_a_request_must_be_open_once() -> None:
    run = runner()
    request = run.request(blocks("ab"))
    for call in (
        lambda: run.manager.extend(request, 1),
        lambda: run.manager.snapshots_due(request, 0, 1),
        lambda: run.manager.close(request, keep=True),
        lambda: run.manager.placement(request),
    ):
        with pytest.raises(ValueError, match=r"request must be open, got 'r1', which is not"):
            call()
    run.start(request)
    with pytest.raises(ValueError, match=r"request must not be open to be opened, got 'r1'"):
        run.manager.open(request)


def test_two_that_compute_one_block_share_its_page() -> None:
    """The later one gives its page back: alone it gets all that the plan promises."""
    run = Runner(CacheManager(tiny_plan(4), headroom_tokens=0))
    longest = run.manager.plan.longest_context_tokens
    prompt = blocks("abc")
    first, second = (run.request((*prompt, 7), max_tokens=longest - 48) for _ in range(2))
    for request in (first, second):
        assert run.start(request) == 0
    for request in (first, second):
        run.prefill(request)
    run.check()
    pages = [list(run.manager.pages(request))[:3] for request in (first, second)]
    assert pages[0] == pages[1]
    run.check()
    run.finish(first)
    second.generated.extend([9] * (longest - second.num_tokens))
    assert run.manager.extend(second, longest)
    run.finish(second)
    run.check_nothing_is_left()


def test_what_is_found_is_let_go_of_and_counted_once_when_it_is_launched() -> None:
    run = runner()
    text = (*blocks("abcdef"), 1)
    run.serve(text)
    request = run.request(text)
    assert run.start(request) == 6 * P
    pinned = run.manager.usage().num_pinned_items[Tenant.SNAPSHOT]
    for _ in range(2):
        run.manager.note_launched(request)
        assert run.manager.usage().num_pinned_items[Tenant.SNAPSHOT] == pinned - 1
        assert run.manager.placement(request).restore is None
        counters = run.manager.counters()
        assert (counters.num_hits, counters.hit_tokens) == (1, 6 * P)
    run.compute(request, request.num_tokens)
    run.finish(request)
    assert run.manager.counters().num_hits == 1
