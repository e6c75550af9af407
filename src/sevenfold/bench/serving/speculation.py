"""Guesses on text that copies itself and on text that misleads, beside plain decoding."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from sevenfold.bench.serving.agreement import check_tokens
from sevenfold.bench.serving.prefill import Report
from sevenfold.bench.serving.sides import Serving, Sides, random_ids
from sevenfold.engine import SamplingParams
from sevenfold.engine.request import Request
from sevenfold.engine.speculation import PromptLookupConfig

# Of a GPU's free memory, each of two engines.
_SHARE = 0.3
# Texts are of so few tokens that every two of them have stood together before.
_FEW = 16
_BIAS = 100.0


def run_speculation(
    sides: Sides, *, prompt_tokens: int, new_tokens: int, repeats: int, report: Report
) -> list[dict[str, Any]]:
    """Time one request's decoding with prompt lookup and without, from its first token to its last.

    Both texts are of 16 tokens. Copying: the best of them, which soon go in circles even where
    weights are random. Hostile: drawn at random, so that the last two have always stood together
    before and what followed then says next to nothing.

    Args:
        sides: checked; transformers' takes no part.
        prompt_tokens: random ones of the 16, before either text.
        new_tokens: of each text, 2 or more.
        repeats: timed runs of each engine; medians.
        report: called with each row as it is done.

    Returns:
        One row a text: seconds a token of both engines, their ratio, guesses made and accepted.
    """
    engines = _engines(sides)
    rows = []
    few = random_ids(sides.config, _FEW).tolist()
    prompt = [few[n % _FEW] for n in random_ids(sides.config, prompt_tokens).tolist()]
    texts = {"copying": {"temperature": 0.0}, "hostile": {"temperature": 1.0, "seed": 0}}
    bias = dict.fromkeys(few, _BIAS)
    for name, options in texts.items():
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, logit_bias=bias, **options)
        row = {"case": f"speculation, {name} text", "new_tokens": new_tokens}
        row |= _compare(engines, prompt, params, repeats)
        tokens = row.pop("tokens")
        assert set(tokens) <= set(few), f"text must be of {few}, got {tokens}"
        if name == "copying":
            check_tokens(sides.model, prompt, tokens, among=few)
        report(row)
        rows.append(row)
    return rows


def _engines(sides: Sides) -> dict[str, Serving]:
    budget = None
    if sides.device.type == "cuda":
        budget = int(_SHARE * torch.cuda.mem_get_info(sides.device)[0])
    return {
        "plain": Serving(sides.model, memory_bytes=budget),
        "guessing": Serving(
            sides.model, memory_bytes=budget, speculation=PromptLookupConfig(draft_tokens=15)
        ),
    }


def _compare(
    engines: dict[str, Serving], prompt: Sequence[int], params: SamplingParams, repeats: int
) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in engines}
    last: dict[str, Request] = {}
    for _ in range(repeats + 1):  # the first of each warms up
        for name, serving in engines.items():
            last[name], seconds = _decode(serving, prompt, params)
            times[name].append(seconds)
    request, tokens = last["guessing"], params.max_tokens - 1
    plain_s, ours_s = (statistics.median(t[1:]) / tokens for t in times.values())
    return {
        "plain_s": plain_s,
        "ours_s": ours_s,
        "ours_tokens_per_s": 1 / ours_s,
        "ratio": plain_s / ours_s,
        "drafted_tokens": request.num_drafted_tokens,
        "accepted_tokens": request.num_accepted_tokens,
        "tokens": list(request.generated),
    }


def _decode(
    serving: Serving, prompt: Sequence[int], params: SamplingParams
) -> tuple[Request, float]:
    """A request, and the seconds from its first token to its last."""
    request = serving.submit(prompt, params.max_tokens, params=params)
    steps, began = serving.steps(), 0.0
    while not request.generated:
        next(steps)
        began = time.perf_counter()
    for _ in steps:
        continue
    return request, time.perf_counter() - began
