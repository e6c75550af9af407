"""Guesses on text that copies itself and on text that misleads, beside plain decoding."""

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sevenfold.bench.serving.agreement import check_tokens
from sevenfold.bench.serving.prefill import Report
from sevenfold.bench.serving.sides import Serving, Sides
from sevenfold.config import ConfigError
from sevenfold.engine import SamplingParams
from sevenfold.engine.request import Request
from sevenfold.engine.speculation import PromptLookupConfig
from sevenfold.models import HybridModel

# Of a GPU's free memory, each of two engines.
_SHARE = 0.3
_CIRCLE = 64  # tokens that the copying text goes round
# What is left of a block's outputs where the stream shall keep its token: next to nothing.
_FAINT = 0.01
_WRITERS = ("out_proj.weight", "o_proj.weight", "down_proj", "down_proj.weight")


def run_speculation(
    sides: Sides, *, prompt_tokens: int, new_tokens: int, repeats: int, report: Report
) -> list[dict[str, Any]]:
    """Time one request's greedy decoding with prompt lookup and without, first token to last.

    Random weights follow no text, so each is written by a copy of the model that goes round a
    circle of tokens, whose steps compute as much: its head reads a token's vector, which blocks
    hardly change, as the next one's. Copying: 64 tokens over and over; guesses are right. Hostile:
    a circle that is longer than the text, whose every two tokens stand together in the prompt with
    another one behind them; there is always a guess, and it is wrong.

    Args:
        sides: checked; transformers' takes no part.
        prompt_tokens: of the copying text, before it.
        new_tokens: of each text, 2 or more.
        repeats: timed runs of each engine; medians.
        report: called with each row as it is done.

    Returns:
        One row a text: seconds a token of both engines, their ratio, guesses made and accepted.

    Raises:
        ConfigError: the vocabulary is too small for so long a text.
    """
    size = sides.config.vocab_size
    if new_tokens + 2 > size:
        raise ConfigError(
            f"new_tokens must be at most vocab_size - 2 = {size - 2}, got {new_tokens}"
        )
    known = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    small, large = known[: min(_CIRCLE, size // 2)], known[: new_tokens + 2]
    texts = {
        "copying": (small, small.repeat(-(-prompt_tokens // len(small)))[:prompt_tokens]),
        "hostile": (large, _misleading(large)),
    }
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    rows = []
    for name, (circle, start) in texts.items():
        model, prompt = _circling(sides.model, circle), start.tolist()
        row = {"case": f"speculation, {name} text", "new_tokens": new_tokens}
        row |= _compare(_engines(model), prompt, params, repeats)
        check_tokens(model, prompt, row.pop("tokens"))
        report(row)
        rows.append(row)
    return rows


@torch.inference_mode()
def _circling(model: HybridModel, circle: torch.Tensor) -> HybridModel:
    """A copy that says the next token of a circle after each of them."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if name.endswith(_WRITERS):
            parameter.mul_(_FAINT)
    own = twin.embed_tokens.weight[circle.to(model.device)]
    # A head of its own, as it may be the embedding's: logits of all other tokens are 0.
    head = torch.zeros_like(twin.lm_head.weight)
    head[circle.roll(-1).to(model.device)] = own / own.norm(dim=-1, keepdim=True)
    twin.lm_head.weight = nn.Parameter(head, requires_grad=False)
    return twin


def _misleading(circle: torch.Tensor) -> torch.Tensor:
    """Every two tokens of a circle, in any order; its first two end the text."""
    pairs = torch.stack([circle, circle.roll(-1)], dim=1)
    order = 1 + torch.randperm(len(pairs) - 1, generator=torch.Generator().manual_seed(1))
    return torch.cat([pairs[order], pairs[:1]]).flatten()


def _engines(model: HybridModel) -> dict[str, Serving]:
    budget = None
    if model.device.type == "cuda":
        budget = int(_SHARE * torch.cuda.mem_get_info(model.device)[0])
    engines = {
        "plain": Serving(model, memory_bytes=budget),
        "guessing": Serving(
            model, memory_bytes=budget, speculation=PromptLookupConfig(draft_tokens=15)
        ),
    }
    for serving in engines.values():
        serving.engine.warm_up()
    return engines


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
