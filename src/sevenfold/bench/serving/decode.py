"""Decoding: tokens a second at some batches, beside transformers."""

import time
from collections.abc import Sequence
from typing import Any

from sevenfold.bench.peer import peer_generate_batch
from sevenfold.bench.serving.prefill import Report
from sevenfold.bench.serving.sides import Serving, Sides, random_ids
from sevenfold.models import ModelConfig
from sevenfold.models.accounting import count_parameters, kv_bytes, state_bytes


def run_decode(
    sides: Sides,
    batches: Sequence[int],
    *,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    report: Report,
) -> list[dict[str, Any]]:
    """Time decoding after the prompts are computed.

    Ours: the engine's steps in which every request decodes. Theirs: generate of new_tokens less
    generate of one. Floor: bytes that a step must move over the measured rate.

    Args:
        sides: checked.
        batches: requests side by side.
        prompt_tokens: of each.
        new_tokens: of each, 2 or more.
        repeats: timed runs of each side; medians.
        report: called with each row as it is done.

    Returns:
        One row a batch.
    """
    serving, rows = Serving(sides.model), []
    for batch in batches:
        ids = random_ids(sides.config, batch, prompt_tokens)
        ours, theirs = [], []
        for _ in range(repeats + 1):  # the first of each warms up
            ours.append(_our_step_s(serving, ids.tolist(), new_tokens))
            theirs.append(_their_step_s(sides, ids, new_tokens))
        row = _row(sides, batch, prompt_tokens, (_median(ours[1:]), _median(theirs[1:])))
        report(row)
        rows.append(row)
    return rows


def _row(
    sides: Sides, batch: int, prompt_tokens: int, step_s: tuple[float, float]
) -> dict[str, Any]:
    ours_s, theirs_s = step_s
    moved = step_bytes(sides.config, batch, prompt_tokens, sides.model.dtype.itemsize)
    return {
        "case": f"decode, batch {batch}",
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "ours_s": ours_s,
        "ours_tokens_per_s": batch / ours_s,
        "transformers_s": theirs_s,
        "transformers_tokens_per_s": batch / theirs_s,
        "ratio": theirs_s / ours_s,
        "floor_s": moved / sides.rates.bytes_per_s,
    }


def step_bytes(config: ModelConfig, batch: int, context_tokens: int, element_bytes: int) -> int:
    """Count the bytes that a decoding step of a batch must move, each weight read once.

        dense weights + head + experts * (1 - (1 - k / E)^batch) + batch * (2 states + keys, values)

    The share of the experts is that of k random ones of E for each token.
    """
    parameters, moe = count_parameters(config), config.moe
    share = 1.0
    if moe is not None:
        share = 1 - (1 - moe.num_experts_per_tok / moe.num_local_experts) ** batch
    mixing = parameters.active - parameters.active_feed_forward
    fed = parameters.dense_feed_forward + share * parameters.experts
    weights = mixing + config.vocab_size * config.hidden_size + fed
    each = 2 * state_bytes(config) + kv_bytes(config, context_tokens, element_bytes)
    return int(weights * element_bytes + batch * each)


def _our_step_s(serving: Serving, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds of a step in which all requests decode."""
    for prompt in prompts:
        serving.submit(prompt, new_tokens)
    spent, num_steps, all_began = 0.0, 0, False
    began = time.perf_counter()
    for num_tokens in serving.steps():
        ended = time.perf_counter()
        # The step that ends the last prompt gives every request a token too, but is no decoding.
        if num_tokens == len(prompts) and all_began:
            spent, num_steps = spent + ended - began, num_steps + 1
        all_began = serving.engine.scheduler.num_decoding == len(prompts)
        began = time.perf_counter()
    return spent / num_steps


def _their_step_s(sides: Sides, ids: Any, new_tokens: int) -> float:
    ids = ids.to(sides.device)
    times = []
    for num in (1, new_tokens):
        began = time.perf_counter()
        peer_generate_batch(sides.peer, ids, num).tolist()
        times.append(time.perf_counter() - began)
    return (times[1] - times[0]) / (new_tokens - 1)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
