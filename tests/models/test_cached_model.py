"""Cached equals uncached: prefill in chunks and decoding give what the whole row gives."""

from collections.abc import Callable
from functools import cache, partial
from unittest import mock

import pytest
import torch
from model_cases import CPU, MOE, by_other_products, furthest, tiny_model, tokens
from torch import Tensor

from sevenfold.models import Batch, HybridModel, empty_state, select_sequences
from sevenfold.models.block import Block
from sevenfold.ops.testing import check_error

MIXES = {
    "linear": {"layers": "ll"},
    "full": {"layers": "ff"},
    "sliding": {"layers": "ss"},
    "mixed": {"layers": "lfs"},
    "mixed, pre-norm": {"layers": "slf", "norm_placement": "pre_norm"},
    "mixed, experts": {"layers": "lsf", "moe": MOE},
    "7:1": {"layers": "lllllllf"},
    "window of one": {"layers": "ls", "window": 1},
}
SEEDS = range(3)
PROMPTS = [11, 3, 7]
NEW = 3
ROOM = max(PROMPTS) + NEW


def uncached(model: HybridModel, ids: list[Tensor]) -> Tensor:
    return torch.cat([model(row[None])[0] for row in ids])


def prefilled(model: HybridModel, ids: list[Tensor], chunk: int):
    """Logits of each prompt, chunk by chunk, packed at unequal lengths, and the state."""
    state = empty_state(model.config, len(ids), ROOM, device=CPU, dtype=model.dtype)
    past, logits = [0] * len(ids), [[] for _ in ids]
    while any(p < n for p, n in zip(past, PROMPTS, strict=True)):
        lengths = [min(chunk, n - p) for p, n in zip(past, PROMPTS, strict=True)]
        parts = [row[p : p + n] for row, p, n in zip(ids, past, lengths, strict=True)]
        batch = Batch.packed(lengths, past=past, device=CPU)
        hidden, state, _ = model.hidden(torch.cat(parts)[None], batch, state)
        for found, part in zip(logits, model.logits(hidden)[0].split(lengths), strict=True):
            found.append(part)
        past = [p + n for p, n in zip(past, lengths, strict=True)]
    return logits, state


def cached(model: HybridModel, ids: list[Tensor], chunk: int, rows: bool) -> Tensor:
    """Prefill in chunks, then decode the rest, as rows or packed."""
    logits, state = prefilled(model, ids, chunk)
    for step in range(NEW):
        past = [n + step for n in PROMPTS]
        new = torch.stack([row[p] for row, p in zip(ids, past, strict=True)])
        if rows:
            batch, new = Batch.rows(len(ids), 1, past=past, device=CPU), new[:, None]
        else:
            batch, new = Batch.packed([1] * len(ids), past=past, device=CPU), new[None]
        hidden, state, _ = model.hidden(new, batch, state)
        for found, part in zip(logits, model.logits(hidden).flatten(0, 1), strict=True):
            found.append(part[None])
    return torch.cat([torch.cat(found) for found in logits])


def honestly(model: HybridModel, ids: list[Tensor], exact: Tensor) -> Tensor:
    """The whole rows' error by two orders of summation."""
    other = torch.cat([by_other_products(model, row[None])[0] for row in ids])
    return furthest(exact, uncached(model, ids), other)


def row_by_row(model: HybridModel, ids: list[Tensor]) -> Tensor:
    """Token by token with a state: an honest run of the same mathematics in another order."""
    outputs = []
    for row in ids:
        state = empty_state(model.config, 1, ROOM, device=CPU, dtype=model.dtype)
        for t, token in enumerate(row):
            batch = Batch.rows(1, 1, past=[t], device=CPU)
            hidden, state, _ = model.hidden(token.view(1, 1), batch, state)
            outputs.append(model.logits(hidden)[0])
    return torch.cat(outputs)


@pytest.fixture
def prompts() -> list[Tensor]:
    return random_prompts()


@cache
def random_prompts() -> list[Tensor]:
    return [tokens(n + NEW, seed=n) for n in PROMPTS]


def over_seeds(run: Callable[[HybridModel], Tensor], mix: str, dtype: torch.dtype) -> Tensor:
    """Several models' outputs as one: the largest error of one small model is a matter of luck."""
    models = [tiny_model(dtype=dtype, seed=seed, **MIXES[mix]) for seed in SEEDS]
    return torch.cat([run(model) for model in models])


@cache
def exact_over_seeds(mix: str) -> Tensor:
    return over_seeds(lambda model: uncached(model, random_prompts()), mix, torch.float64)


@cache
def honest_over_seeds(mix: str, dtype: torch.dtype) -> Tensor:
    parts = exact_over_seeds(mix).chunk(len(SEEDS))
    models = [tiny_model(dtype=dtype, seed=seed, **MIXES[mix]) for seed in SEEDS]
    pairs = zip(models, parts, strict=True)
    return torch.cat([honestly(model, random_prompts(), part) for model, part in pairs])


@cache
def honest_by_single_tokens(mix: str) -> Tensor:
    """In fp64, against the error of a row by single tokens too."""
    single = over_seeds(lambda model: row_by_row(model, random_prompts()), mix, torch.float64)
    return furthest(exact_over_seeds(mix), single, honest_over_seeds(mix, torch.float64))


@pytest.mark.parametrize("mix", MIXES)
def test_token_by_token_equals_whole_rows(mix: str, prompts: list[Tensor]) -> None:
    found = over_seeds(lambda model: row_by_row(model, prompts), mix, torch.float32)
    honest = honest_over_seeds(mix, torch.float32)
    check_error("logits", found, honest, exact_over_seeds(mix))


@pytest.mark.parametrize("chunk", [1, 3, 11])
@pytest.mark.parametrize("mix", MIXES)
def test_chunks_and_decoding_equal_whole_rows(mix: str, chunk: int, prompts: list[Tensor]) -> None:
    exact, honest = exact_over_seeds(mix), honest_over_seeds(mix, torch.float32)
    for rows in (True, False):
        run = partial(cached, ids=prompts, chunk=chunk, rows=rows)
        check_error("fp32", over_seeds(run, mix, torch.float32), honest, exact)
    run = partial(cached, ids=prompts, chunk=chunk, rows=True)
    check_error("fp64", over_seeds(run, mix, torch.float64), honest_by_single_tokens(mix), exact)


@pytest.mark.parametrize("mix", ["linear", "mixed", "sliding"])
def test_bf16_keeps_the_error_rule(mix: str, prompts: list[Tensor]) -> None:
    exact = uncached(tiny_model(**MIXES[mix]), prompts)
    low = tiny_model(dtype=torch.bfloat16, **MIXES[mix])
    found = cached(low, prompts, 3, rows=True)
    assert found.dtype == torch.float32
    check_error("logits", found.bfloat16(), uncached(low, prompts).bfloat16(), exact)


@pytest.mark.parametrize("mix", ["linear", "sliding", "mixed"])
def test_a_whole_prompt_in_equal_rows(mix: str) -> None:
    ids = tokens(3, 9)
    exactly, single = tiny_model(**MIXES[mix]), tiny_model(dtype=torch.float32, **MIXES[mix])
    state = empty_state(single.config, 3, 9, device=CPU, dtype=torch.float32)
    batch = Batch.rows(3, 9, device=CPU)
    found, advanced, _ = single.hidden(ids, batch, state)
    assert len(advanced) == len(state)
    check_error("logits", single.logits(found), single(ids), exactly(ids))


def test_a_packed_forward_equals_its_rows(prompts: list[Tensor]) -> None:
    exactly, single = (tiny_model("lsf", dtype=dtype) for dtype in (torch.float64, torch.float32))
    batch = Batch.packed([len(row) for row in prompts], device=CPU)
    found = single.logits(single.hidden(torch.cat(prompts)[None], batch).hidden)[0]
    exact = uncached(exactly, prompts)
    check_error("logits", found, honestly(single, prompts, exact), exact)


def test_a_selected_sequence_decodes_on_its_own(prompts: list[Tensor]) -> None:
    model = tiny_model("lsf", dtype=torch.float32)
    _, state = prefilled(model, prompts, 4)
    before = [layer.kv.clone() for layer in state[:1]]
    alone = select_sequences(state, torch.tensor([1]))
    batch = Batch.rows(1, 1, past=[PROMPTS[1]], device=CPU)
    row = prompts[1][: PROMPTS[1] + 1]
    hidden = model.hidden(row[None, -1:], batch, alone).hidden
    exact = tiny_model("lsf")(row[None])[:, -1:]
    honest = furthest(exact, model(row[None])[:, -1:], by_other_products(model, row[None])[:, -1:])
    check_error("logits", model.logits(hidden), honest, exact)
    assert torch.equal(state[0].kv, before[0])


def test_sequences_of_a_cached_batch_never_see_each_other(prompts: list[Tensor]) -> None:
    model = tiny_model("lsf", dtype=torch.float32)
    other = [prompts[0], tokens(len(prompts[1]), seed=99), prompts[2]]
    lengths = [n + NEW for n in PROMPTS]
    before, after = (cached(model, ids, 3, True).split(lengths) for ids in (prompts, other))
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixed", "mixed, pre-norm", "mixed, experts"])
def test_inference_between_norms_gives_the_bits_of_layer_by_layer(
    name: str, dtype: torch.dtype
) -> None:
    model = tiny_model(dtype=dtype, **MIXES[name])
    found = []
    for with_grad in (False, True):  # with gradients a model goes layer by layer
        state = empty_state(model.config, 2, 9, device=CPU, dtype=dtype)
        with (
            torch.set_grad_enabled(with_grad),
            mock.patch.object(
                Block, "forward", autospec=True, side_effect=Block.forward
            ) as forward,
        ):
            batch = Batch.rows(2, 9, device=CPU)
            hidden, after, _ = model.hidden(tokens(2, 9), batch, state)
        assert bool(forward.call_count) == with_grad
        found.append((hidden, *(x for value in after or () for x in vars_of(value))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def vars_of(value: object) -> list[Tensor]:
    return [x for x in vars(value).values() if isinstance(x, Tensor)]
