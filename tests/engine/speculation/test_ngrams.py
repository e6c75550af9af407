"""Prompt lookup against a search of the whole text."""

import gc
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.engine.request import Request
from sevenfold.engine.sampling import Output, SamplingParams
from sevenfold.engine.speculation.config import PromptLookupConfig
from sevenfold.engine.speculation.drafter import Ask
from sevenfold.engine.speculation.ngrams import NgramIndex
from sevenfold.engine.speculation.prompt_lookup import MOST_READ_TOKENS, PromptLookup

TEXTS = st.lists(st.integers(0, 2), max_size=40)


def match(text: list[int], place: int, most: int) -> int:
    """How many of the tokens before a place are those before the text's end."""
    length = 0
    while length < min(place, most) and text[place - 1 - length] == text[-1 - length]:
        length += 1
    return length


@settings(max_examples=80, deadline=None)
@given(text=TEXTS, least=st.integers(1, 3), width=st.integers(1, 3), cut=st.integers(0, 40))
def test_the_longest_match_is_found(text: list[int], least: int, width: int, cut: int) -> None:
    config = PromptLookupConfig(min_match_tokens=least, max_match_tokens=6, max_places=40)
    index = NgramIndex(config)
    index.extend(text[:cut])
    index.extend(text[cut:])
    found = index.continuations(4, width)
    places = {place: match(text, place, 6) for place in range(1, len(text))}
    places = {place: length for place, length in places.items() if length >= least}
    best = sorted(places, key=lambda place: (places[place], place), reverse=True)
    wanted: dict[int, list[int]] = {}
    for place in best:
        repeated = text[place:] * 4
        wanted.setdefault(text[place], repeated[:4])
    assert found == list(wanted.values())[:width]


def test_only_the_latest_places_are_compared() -> None:
    config = PromptLookupConfig(min_match_tokens=1, max_places=1)
    index = NgramIndex(config)
    index.extend([1, 2, 3, 9, 3, 1, 2, 3])
    assert index.continuations(2, 2) == [[1, 2]]
    assert NgramIndex(config).continuations(2, 1) == []


def test_ids_beside_each_other_are_not_mixed_up() -> None:
    index = NgramIndex(PromptLookupConfig())
    index.extend([1, 0, 5, 0, 1, 6, 0, 0, 1, 0])
    assert index.continuations(2, 2) == [[5, 0]]
    index.extend([0, (1 << 32) - 2, 9, 0, (1 << 32) - 2])
    assert index.continuations(2, 2) == [[9, 0]]


def test_a_token_leaves_nothing_to_the_garbage_collector() -> None:
    index = NgramIndex(PromptLookupConfig())
    gc.collect()
    before = len(gc.get_objects())
    index.extend(list(range(5000)))
    assert len(gc.get_objects()) - before < 50


@dataclass
class Asked:
    request: Request
    drafter: PromptLookup = field(
        default_factory=lambda: PromptLookup(PromptLookupConfig(history_tokens=20_000))
    )

    def paths(self) -> list[list[int]]:
        output = Output(SamplingParams(), self.request.prompt, (), self.request.generated)
        return self.drafter.propose([Ask(self.request, output, 3, 1)])[0]


def test_a_long_prompt_is_indexed_step_by_step_and_an_output_as_it_comes() -> None:
    prompt = (7, 8, 9, *range(100, 30_100))
    asked = Asked(Request("a", prompt, 100))
    asked.request.generated += [500, 501]
    asked.drafter.read([asked.request], 20_000 - 3 * MOST_READ_TOKENS)
    steps = []
    for _ in range(3):
        steps.append(asked.paths())
        asked.drafter.read([asked.request], 0)
    # What 500, 501 once went on with has left the history; 20,101 and 20,102 have not.
    assert steps == [[], [], []]
    asked.request.generated += [20_101, 20_102]
    assert asked.paths() == [[20_103, 20_104, 20_105]]
    asked.request.generated += [7, 20_101, 20_102]
    assert asked.paths() == [[7, 20_101, 20_102]]
    asked.drafter.forget("a")
    assert asked.paths() == []


def test_of_several_prompts_the_first_is_read_first() -> None:
    drafter = PromptLookup(PromptLookupConfig())
    requests = [
        Request(name, tuple(range(length)), 9)
        for name, length in (("a", 10), ("b", MOST_READ_TOKENS), ("c", 30))
    ]
    known = lambda: [indexed.num_tokens for indexed in drafter._indexed.values()]  # noqa: E731
    drafter.read(requests, 0)
    assert known() == [10, MOST_READ_TOKENS - 10]
    drafter.read(requests, 0)
    assert known() == [10, MOST_READ_TOKENS, 30]
    drafter.read(requests[:1], 0)
    assert known() == [10, MOST_READ_TOKENS, 30]
