"""What the last requests left is found by comparing tokens, as far as it is still there."""

from hashlib import sha256

import pytest
from cache_helpers import P, Runner, blocks, tiny_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.engine.cache import CacheManager, MissReason, keys, trails
from sevenfold.engine.cache.keys import KeyChain
from sevenfold.engine.request import Request

LETTERS = st.text("ab", max_size=6)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What has been hashed."""
    seen: list[bytes] = []

    def watched(data: bytes):
        seen.append(data)
        return sha256(data)

    monkeypatch.setattr(keys, "sha256", watched)
    return seen


def chat(num_blocks: int) -> str:
    return "".join(chr(ord("a") + n % 26) for n in range(num_blocks))


def num_common(a: str, b: str) -> int:
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def runner(num_slabs: int = 40) -> Runner:
    return Runner(CacheManager(tiny_plan(num_slabs), headroom_tokens=0))


def test_the_next_turn_hashes_no_block_that_the_last_one_left(hashed: list[bytes]) -> None:
    run = runner()
    first = blocks(chat(30))
    run.serve((*first, 1), output=blocks("xy"))
    hashed.clear()
    assert run.serve((*first, 1, *blocks("xy"), *blocks("q"))) == 32 * P
    assert len(hashed) == 1  # what follows


def test_a_prompt_shorter_than_a_block_leaves_a_trail_that_is_found(hashed: list[bytes]) -> None:
    run = runner()
    text = blocks(chat(30))
    run.serve(text[:1], output=text[1:])
    hashed.clear()
    assert run.serve((*text, 1)) == 28 * P  # as decoding keeps states
    assert len(hashed) == 1


def test_another_salt_meets_no_trail(hashed: list[bytes]) -> None:
    run = runner()
    prompt = (*blocks(chat(30)), 1)
    run.serve(prompt, salt=b"one")
    request = run.request(prompt, salt=b"other")
    assert run.start(request) == 0
    assert run.manager.lookup(request).reason is MissReason.OTHER_SALT
    assert run.manager._trails.along(KeyChain(request, P), 30).nodes == []
    assert run.serve(prompt, salt=b"one") == 30 * P


@settings(deadline=None)
@given(
    shared=LETTERS,
    own=LETTERS,
    others=st.lists(LETTERS, max_size=5),
    tail=st.integers(0, P - 1),
    most=st.integers(0, 13),
)
def test_the_closest_of_several_is_found(shared, own, others, tail, most) -> None:
    chain = KeyChain(Request("r", (*blocks(shared + own), *[5] * tail, 7), 1), P)
    texts = [shared + other for other in others] + others
    packed = [KeyChain(Request("s", (*blocks(t), 7), 1), P).packed(len(t)) for t in texts]
    common = [min(num_common(shared + own, text), most) for text in texts]
    best = max(common, default=0)
    assert chain.closest(packed, most) == (best, common.index(best) if best else 0)


def test_a_block_that_nobody_sent_is_not_hashed_before_it_runs(hashed: list[bytes]) -> None:
    run = runner()
    first = blocks(chat(30))
    run.serve((*first, 1), output=blocks("xy"))
    prompt = (*first, 1, *blocks("xy"), *blocks("q"))
    hashed.clear()
    request = run.request(prompt)
    assert run.start(request) == 32 * P
    assert run.compute(request, len(prompt))
    assert hashed == []
    run.finish(request)
    assert len(hashed) == 1


def test_a_branch_behind_blocks_that_are_back_is_found() -> None:
    run = runner()
    short, long = blocks(chat(10)), blocks(chat(12))
    run.serve((*long, 1))
    run.manager.clear()
    run.serve((*short, 1))
    request = run.request((*long, 1))
    assert run.start(request) == 10 * P
    assert run.manager.lookup(request).seen_tokens == 12 * P


def test_blocks_that_have_been_dropped_do_not_count() -> None:
    run = runner()
    prompt = (*blocks(chat(30)), 1)
    run.serve(prompt, marks=(20 * P,))
    nodes = [run.manager._tree.get(key) for key in KeyChain(run.request(prompt), P).keys(30)]
    assert nodes[29] is not None
    assert nodes[29].anchor is not None
    run.manager._tree.drop(nodes[29].anchor)
    request = run.request(prompt)
    assert len(run.manager._trails.along(KeyChain(request, P), 30).nodes) == 20
    assert run.serve(prompt) == 20 * P
    # What was computed again is other nodes, of the same keys.
    assert run.serve(prompt) == 30 * P
    assert len(run.manager._trails) == 1
    assert run.manager._trails._num_blocks == 30


def test_a_chat_has_one_trail_however_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner(100)
    held = run.manager._trails
    for turn in range(10, 20):
        run.serve((*blocks(chat(turn)), 1))
        assert (len(held), held._num_blocks) == (1, turn)
    run.serve((*blocks(chat(12)), 1))
    assert (len(held), held._num_blocks) == (1, 19)
    # An answer that was asked for again goes another way.
    run.serve((*blocks(chat(12) + "zz"), 1))
    assert (len(held), held._num_blocks) == (2, 33)
    monkeypatch.setattr(trails, "_MOST_BLOCKS", 40)
    run.serve((*blocks("z" + chat(14)), 1))
    assert (len(held), held._num_blocks) == (2, 29)
    run.manager.clear()
    assert (len(held), held._num_blocks) == (0, 0)
