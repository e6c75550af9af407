"""The choice of a token against an independent statement of its distribution, and its rules."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from sevenfold.config import ConfigError, parse_config
from sevenfold.engine import SamplingParams
from sevenfold.engine.sampling import (
    Output,
    Penalties,
    Sampler,
    bad_word_tokens,
    build_rules,
    choose_tokens,
    read_logprobs,
    uniform,
)
from sevenfold.engine.sampling.bad_words import completing_tokens

VOCAB = 12
NOTHING_SEEN = torch.tensor([], dtype=torch.int64)
SEEN = torch.tensor([0, 3, 7])
JUST_BELOW_ONE = math.nextafter(1, 0)


CPU = torch.device("cpu")


def choose_token(
    logits: torch.Tensor, seen: torch.Tensor, params: SamplingParams, draw: float
) -> int:
    """One row of a batch, its prompt being what was seen."""
    size = len(logits)
    penalties = Penalties([params], [seen.tolist()], [[]], size, CPU)
    rules = build_rules([params], size, CPU)
    draws = torch.tensor([draw], dtype=torch.float64)
    return int(choose_tokens(penalties.apply(logits[None]), rules, draws))


def random_logits(seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def distribution(logits: torch.Tensor, seen: torch.Tensor, params: SamplingParams) -> list[float]:
    """Each token's probability: penalty, temperature, top_k, top_p, min_p, then renormalised."""
    values = logits.tolist()
    for token in seen.tolist():
        up = values[token] > 0
        values[token] *= 1 / params.repetition_penalty if up else params.repetition_penalty
    weights = {token: math.exp(z / params.temperature) for token, z in enumerate(values)}
    ranked = sorted(weights, key=lambda token: -weights[token])[: params.top_k]
    if params.top_p is not None:
        total, reached, kept = sum(weights[token] for token in ranked), 0.0, []
        for token in ranked:
            if reached >= params.top_p * total:
                break
            kept.append(token)
            reached += weights[token]
        ranked = kept
    if params.min_p is not None:
        least = params.min_p * weights[ranked[0]]
        ranked = [token for token in ranked if weights[token] >= least]
    total = sum(weights[token] for token in ranked)
    return [weights[token] / total if token in ranked else 0.0 for token in weights]


CASES = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 4},
    "top_k above the vocabulary": {"top_k": 50},
    "top_p": {"top_p": 0.7},
    "a small top_p keeps one": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p of one": {"min_p": 1.0},
    "penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6},
    "top_p within top_k": {"top_k": 5, "top_p": 0.8},
    "all": {
        "temperature": 1.3,
        "top_k": 8,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_share_of_draws_is_the_probability(case: str) -> None:
    logits, params, grid = random_logits(), SamplingParams(**CASES[case]), 1024
    draws = ((i + 0.5) / grid for i in range(grid))
    counts = Counter(choose_token(logits, SEEN, params, draw) for draw in draws)
    wanted = distribution(logits, SEEN, params)
    for token, probability in enumerate(wanted):
        assert abs(counts[token] / grid - probability) <= 1 / grid, (token, probability)
        assert probability or not counts[token]


@pytest.mark.parametrize("case", CASES)
def test_the_ends_of_the_draw(case: str) -> None:
    params = SamplingParams(**CASES[case])
    for seed in range(5):
        logits = random_logits(seed)
        wanted = distribution(logits, SEEN, params)
        kept = [token for token in range(VOCAB) if wanted[token]]
        best = max(kept, key=wanted.__getitem__)
        last = min(kept, key=wanted.__getitem__)
        assert choose_token(logits, SEEN, params, 0.0) == best
        assert choose_token(logits, SEEN, params, JUST_BELOW_ONE) == last


def test_rules_act_in_their_order() -> None:
    """Half, a quarter, an eighth, an eighth: each rule sees what the rule before it left."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()

    def kept(**options: float) -> set[int]:
        params = SamplingParams(**options)
        draws = (i / 64 for i in range(64))
        return {choose_token(logits, NOTHING_SEEN, params, draw) for draw in draws}

    assert kept() == {0, 1, 2, 3}
    # Of the two best, the first has 2/3: enough for 0.6, though it has half of all.
    assert kept(top_p=0.6) == {0, 1}
    assert kept(top_p=0.6, top_k=2) == {0}
    # The temperature comes before top_p: at 1/2 the first has 0.727.
    assert kept(top_p=0.7) == {0, 1}
    assert kept(top_p=0.7, temperature=0.5) == {0}
    # And before min_p: at 1/2 the second has a quarter of the first's.
    assert kept(min_p=0.4) == {0, 1}
    assert kept(min_p=0.4, temperature=0.5) == {0}


def test_the_penalty_comes_before_the_temperature_zero() -> None:
    logits = torch.tensor([3.0, 2.5, -1.0])
    greedy = SamplingParams(temperature=0.0)
    penalised = SamplingParams(temperature=0.0, repetition_penalty=1.5)
    for draw in (0.0, JUST_BELOW_ONE):
        assert choose_token(logits, torch.tensor([0]), greedy, draw) == 0
        assert choose_token(logits, torch.tensor([0]), penalised, draw) == 1
        assert choose_token(logits, torch.tensor([0, 1]), penalised, draw) == 0
        assert choose_token(logits, NOTHING_SEEN, penalised, draw) == 0
    negative = torch.tensor([-2.0, -2.5])
    assert choose_token(negative, torch.tensor([0]), penalised, 0.5) == 1  # -3, not -1.33


def test_equal_tokens_share_the_draws_equally() -> None:
    """A quarter each, exactly: a draw on a border belongs to the token that begins there."""
    logits = torch.zeros(4)
    for params in (SamplingParams(), SamplingParams(min_p=1.0), SamplingParams(top_p=1.0)):
        chosen = [choose_token(logits, NOTHING_SEEN, params, quarter / 4) for quarter in range(4)]
        assert sorted(chosen) == [0, 1, 2, 3]
        below = [math.nextafter(quarter / 4, 0) for quarter in range(1, 5)]
        assert [choose_token(logits, NOTHING_SEEN, params, draw) for draw in below] == chosen


def test_logits_stay_as_they_were() -> None:
    logits = random_logits()
    before = logits.clone()
    choose_token(logits, SEEN, SamplingParams(**CASES["all"]), 0.3)
    assert torch.equal(logits, before)


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0])
    params = SamplingParams()
    found = {choose_token(logits, NOTHING_SEEN, params, i / 32) for i in range(32)}
    found.add(choose_token(logits, NOTHING_SEEN, params, JUST_BELOW_ONE))
    assert found == {0, 2}


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 3), ("top_p", 0.9), ("min_p", 0.1), ("seed", 0)]
)
def test_what_temperature_zero_would_ignore_is_refused(name: str, value: float) -> None:
    rule = f"{name} must be left out at temperature 0, where it has no effect"
    with pytest.raises(ConfigError, match=rule):
        parse_config(SamplingParams, {"temperature": 0, name: value}, "request")
    with pytest.raises(ValueError, match=rule):
        SamplingParams(temperature=0, **{name: value})
    assert getattr(SamplingParams(temperature=0.1, **{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 100.5),
        ("temperature", 1e-40),
        ("temperature", 0.0099),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 0.0),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("stop", ("a", "")),
        ("max_tokens", 1.5),
        ("seed", "1"),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_ranges_and_types(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_the_limits_of_the_ranges_hold() -> None:
    params = SamplingParams(max_tokens=1, top_k=1, top_p=1.0, min_p=1.0, seed=2**64 - 1)
    assert (params.max_tokens, params.top_k, params.top_p, params.min_p) == (1, 1, 1.0, 1.0)
    assert torch.Generator().manual_seed(2**64 - 1).initial_seed() == params.seed
    for end in (0.01, 100.0):
        params = SamplingParams(temperature=end, repetition_penalty=end)
        assert (params.temperature, params.repetition_penalty) == (end, end)


def test_an_unknown_key_names_the_nearest() -> None:
    rule = "request: temprature is not a known key; did you mean temperature"
    with pytest.raises(ConfigError, match=rule):
        parse_config(SamplingParams, {"temprature": 1.0}, "request")


def test_a_batch_chooses_as_each_row_alone() -> None:
    """Rows with every set of rules, greedy ones between them, and each its own penalties."""
    greedy = {"temperature": 0.0, "repetition_penalty": 1.4}
    params = [SamplingParams(**options) for options in [*CASES.values(), greedy, {}]]
    N = len(params)
    logits = torch.stack([random_logits(n) for n in range(N)])
    prompts = [[n % VOCAB, (3 * n) % VOCAB] for n in range(N)]
    penalties = Penalties(params, prompts, [[]] * N, VOCAB, CPU)
    draws = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen = choose_tokens(penalties.apply(logits), build_rules(params, VOCAB, CPU), draws)
    alone = [
        choose_token(logits[n], torch.tensor(prompts[n]), params[n], float(draws[n]))
        for n in range(N)
    ]
    assert chosen.tolist() == alone
    assert len(set(alone)) > 2


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.zeros(1, 4)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 1.5})
    penalties = Penalties([params], [[0]], [[1]], 4, CPU)
    assert penalties.apply(logits).tolist() == [[0.0, -0.75, 0.0, 1.5]]
    for token in (1, 2):
        penalties.record(torch.tensor([token]))
    assert penalties.apply(logits).tolist() == [[0.0, -1.0, -0.75, 1.5]]
    assert not logits.any()


def test_only_the_rows_that_ask_are_changed() -> None:
    params = [SamplingParams(), SamplingParams(presence_penalty=1.0), SamplingParams()]
    penalties = Penalties(params, [[0]] * 3, [[0]] * 3, 2, CPU)
    penalties.record(torch.tensor([1, 1, 1]))
    assert penalties.apply(torch.zeros(3, 2)).tolist() == [[0, 0], [-1, -1], [0, 0]]


def test_min_tokens_holds_the_ends_back() -> None:
    output = Output(SamplingParams(temperature=0, min_tokens=2), [0], end_ids=(1, 3))
    sampler = Sampler([output], 4, CPU)
    logits = torch.tensor([[0.0, 9.0, 1.0, 8.0]])
    chosen = []
    for _ in range(3):
        chosen.append(int(sampler.choose(logits)))
        output.tokens.append(chosen[-1])
    assert chosen == [2, 2, 1]


def test_draws_are_uniform_and_depend_on_seed_and_place_alone() -> None:
    places = torch.arange(4096)
    u = uniform(torch.full((4096,), 7), places)
    assert u.dtype == torch.float64
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    # Pearson's chi-squared over 64 cells: 63 degrees of freedom, 6 standard deviations.
    counts = torch.histc(u.float(), 64, 0, 1)
    assert abs(float(((counts - 64) ** 2 / 64).sum()) - 63) < 6 * math.sqrt(2 * 63)
    pairs = (u[:-1] * 8).long() * 8 + (u[1:] * 8).long()
    counts = torch.bincount(pairs, minlength=64).double()
    mean = len(pairs) / 64
    assert abs(float(((counts - mean) ** 2 / mean).sum()) - 63) < 6 * math.sqrt(2 * 63)
    seeds = torch.tensor([-1, 7, 2**62])
    assert torch.equal(uniform(seeds, torch.tensor([5, 9, 2]))[1], u[9])
    first = uniform(torch.arange(4096), torch.zeros(4096, dtype=torch.int64))
    assert len(first.unique()) == 4096


def test_the_same_draws_as_splitmix64() -> None:
    """The first number of the published generator started at mix(0)."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for seed, place in [(0, 0), (7, 3), (2**64 - 1, 12345)]:
        exact = mix((mix(seed) + (place + 1) * 0x9E3779B97F4A7C15) & mask) >> 11
        signed = seed - (1 << 64) if seed >= 1 << 63 else seed
        assert float(uniform(torch.tensor([signed]), torch.tensor([place]))) == exact / 2**53


def test_a_seed_draws_the_same_after_a_new_start() -> None:
    """A sampler built anew in the middle of an output goes on as the old one would have."""
    logits = random_logits()[None]
    params = SamplingParams(seed=2**64 - 3, presence_penalty=0.3)
    whole, parted = (Output(params, [0], ()) for _ in range(2))
    sampler = Sampler([whole], VOCAB, CPU)
    for _ in range(12):
        whole.tokens.append(int(sampler.choose(logits)))
    for _ in range(12):
        parted.tokens.append(int(Sampler([parted], VOCAB, CPU).choose(logits)))
    assert whole.tokens == parted.tokens
    assert len(set(whole.tokens)) > 1


def test_without_a_seed_draws_differ() -> None:
    assert Output(SamplingParams(), [0], ()).seed != Output(SamplingParams(), [0], ()).seed


def test_more_tokens_at_least_than_at_most() -> None:
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens = 3, got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_logprobs_are_the_models_own() -> None:
    logits = torch.stack([random_logits(n) for n in range(3)])
    params = [SamplingParams(logprobs=n, temperature=0.3) for n in (2, 0)] + [SamplingParams()]
    two, none, nothing = read_logprobs(
        logits, torch.tensor([5, 1, 2]), [p.logprobs for p in params]
    )
    assert nothing is None
    assert none is not None and none.top == ()  # noqa: PT018
    total = [math.log(sum(math.exp(z) for z in row)) for row in logits.tolist()]
    assert none.chosen == pytest.approx(float(logits[1, 1]) - total[1])
    ranked = sorted(range(VOCAB), key=lambda token: -float(logits[0, token]))
    assert two is not None
    assert [token for token, _ in two.top] == ranked[:2]
    wanted = [float(logits[0, token]) - total[0] for token in ranked[:2]]
    assert [value for _, value in two.top] == pytest.approx(wanted)
    assert read_logprobs(logits, torch.tensor([0, 0, 0]), [None] * 3) == [None] * 3


def test_a_row_of_nan_leaves_the_others_alone() -> None:
    logits = torch.stack([random_logits(), torch.full((VOCAB,), math.nan), random_logits(1)])
    params = [SamplingParams(top_p=0.9), SamplingParams(top_p=0.9), SamplingParams()]
    draws = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)
    first, drawn, third = choose_tokens(logits, build_rules(params, VOCAB, CPU), draws).tolist()
    assert 0 <= drawn < VOCAB
    assert first == choose_token(logits[0], NOTHING_SEEN, params[0], 0.3)
    assert third == choose_token(logits[2], NOTHING_SEEN, params[2], 0.5)


def test_tokens_that_would_complete_a_bad_word() -> None:
    words = ((5,), (1, 2), (1, 2, 3), (2, 2, 4))
    assert completing_tokens(words, []) == [5]
    assert completing_tokens(words, [1]) == [5, 2]
    assert completing_tokens(words, [9, 1, 2]) == [5, 3]
    assert completing_tokens(words, [2, 2]) == [5, 4]


def test_a_bad_word_is_taken_at_the_beginning_and_after_a_space(tokenizer: Tokenizer) -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    assert bad_word_tokens(tokenizer, ["heron"]) == (ids("heron"), ids(" heron"))
    assert bad_word_tokens(tokenizer, [" heron"]) == (ids(" heron"),)
    assert bad_word_tokens(tokenizer, []) == ()


def test_a_bad_words_last_token_is_never_drawn() -> None:
    params = SamplingParams(seed=0, temperature=5.0)
    one = Output(params, [1], (), [3], ((3, 0), (7, 1)))
    sampler = Sampler([one], 3, torch.device("cpu"))
    logits = torch.tensor([[9.0, 5.0, 1.0]])
    drawn = {int(sampler.choose(logits)) for _ in range(100)}
    assert drawn == {1, 2}
    assert torch.equal(logits, torch.tensor([[9.0, 5.0, 1.0]])), "what comes in stays as it is"


@pytest.mark.parametrize("params", [{}, {"logit_bias": {3: 50.0}}, {"temperature": 1.0, "seed": 5}])
def test_a_checked_choice_is_the_choice_and_tells_which_rows_are_finite(params: dict) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    logits[1, 2] = math.nan
    forbidden = logits.index_fill(1, torch.tensor([0]), -math.inf)

    def sampler() -> Sampler:
        asked = SamplingParams(**{"temperature": 0.0} | params)
        return Sampler([Output(asked, (), ()) for _ in range(3)], VOCAB, CPU)

    for given in (logits, forbidden):
        one, other = sampler(), sampler()
        for _ in range(2):
            found = one.choose_checked(given, logits)
            assert torch.equal(found[:, 0], other.choose(given))
            assert found[:, 1].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temprature": 1.0}, "temprature is not a known key; did you mean temperature?"),
        ({"max_tokens": "9"}, "max_tokens must be valid: Input should be a valid integer, got '9'"),
        ({"temperature": 0.001}, "temperature must be 0 or at least 0.01, got 0.001"),
        ({"stop": ["a", ""]}, "stop.1 must be valid: String should have at least 1 character"),
        ({"stop": 5}, "stop must be valid: Input should be a valid tuple, got 5"),
        ({"temperature": 0, "seed": 1}, "seed must be left out at temperature 0, where it has no"),
        (
            {"top_k": 0, "min_p": 2.0},
            "top_k must be valid: Input should be greater than or equal to 1, got 0; min_p must",
        ),
    ],
)
def test_a_call_names_what_is_wrong_with_it(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**values)
    assert str(caught.value).startswith(f"SamplingParams: {message}")
    assert "\n" not in str(caught.value)
    assert "http" not in str(caught.value)


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_texts_are_one_or_a_list_or_a_tuple(name: str) -> None:
    for value, expected in (("ab", ("ab",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ())):
        values: dict[str, Any] = {name: value}
        assert getattr(SamplingParams(**values), name) == expected
        assert getattr(parse_config(SamplingParams, values, "request"), name) == expected
    tokens: Any = [3, 4]
    assert SamplingParams(stop_token_ids=tokens).stop_token_ids == (3, 4)
