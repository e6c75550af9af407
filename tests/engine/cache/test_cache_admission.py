"""Where prompts get snapshots."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.engine.cache.admission import (
    MOST_MARKS,
    PromptPlaces,
    decode_snapshot,
    wanted_snapshots,
)


def places(num_tokens: int, marks=(), branch: int = 0) -> PromptPlaces:
    return PromptPlaces(num_tokens, marks, branch)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        (places(15), {}),
        (places(16), {}),
        (places(17), {16: True}),
        (places(500), {496: True}),
        # The generation prompt is in the last block: its beginning stands for the prompt's end.
        (places(500, (100, 490)), {96: True, 480: True}),
        (places(500, (100,)), {96: True, 496: True}),
        (places(500, (100, 490), 208), {96: True, 208: True, 480: True}),
        (
            places(321, (32, 70, 130, 200, 256, 320)),
            {32: True, 64: False, 128: False, 192: False, 256: False, 320: True},
        ),
        # Of many marks the first and the last 16.
        (
            places(641, tuple(range(32, 641, 32))),
            {32: True} | dict.fromkeys(range(160, 640, 32), False) | {640: True},
        ),
        (places(9000), {1024: False, 2048: False, 4096: False, 8992: True}),
    ],
)
def test_snapshots_lie_where_turns_end(prompt: PromptPlaces, wanted: dict[int, bool]) -> None:
    assert wanted_snapshots(prompt, 16) == wanted


@settings(deadline=None)
@given(data=st.data(), num_tokens=st.integers(1, 100_000), page=st.sampled_from([16, 48, 64]))
def test_they_are_few_and_on_borders(data, num_tokens, page) -> None:
    marks = data.draw(st.lists(st.integers(1, num_tokens), unique=True, max_size=200).map(sorted))
    branch = data.draw(st.integers(0, num_tokens))
    wanted = wanted_snapshots(places(num_tokens, marks, branch), page)
    assert all(0 < at <= num_tokens and at % page == 0 for at in wanted)
    assert len(wanted) <= 4 + MOST_MARKS + num_tokens.bit_length()
    for mark in (*marks[:1], *marks[-1:], branch):
        assert mark < page or wanted[mark // page * page]
    # Never more than two blocks are computed again by one who sends the same prompt and more.
    if num_tokens > page:
        assert num_tokens - max(wanted) <= 3 * page


@pytest.mark.parametrize(
    ("first", "end", "page", "at"),
    [
        (0, 63, 16, None),
        (63, 64, 16, 64),
        (64, 65, 16, None),
        (100, 130, 16, 128),
        (50, 200, 16, 192),
        (63, 64, 48, None),
        (95, 96, 48, 96),
    ],
)
def test_decoding_keeps_a_state_every_64_tokens(first, end, page, at) -> None:
    assert decode_snapshot(first, end, page) == at
