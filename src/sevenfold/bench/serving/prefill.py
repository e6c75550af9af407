"""Prefill: tokens a second against length, beside transformers and an all-softmax twin."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from sevenfold.bench.measure import interleaved_median_s
from sevenfold.bench.peer import peer_prefill
from sevenfold.bench.serving.sides import Serving, Sides, random_ids
from sevenfold.models import HybridModel, init_weights
from sevenfold.models.accounting import prefill_flops

# Of a GPU's free memory: the twin keeps keys and values in every layer.
_OUR_SHARE, _TWIN_SHARE = 0.2, 0.55

Report = Callable[[Mapping[str, Any]], None]


def run_prefill(
    sides: Sides,
    lengths: Sequence[int],
    *,
    peer_most_tokens: int,
    twin_most_tokens: int,
    repeats: int,
    report: Report,
) -> list[dict[str, Any]]:
    """Time the first token after prompts of some lengths, from submission to the token itself.

    The twin is our model with softmax attention in every layer. Floor: the prefill's FLOPs over the
    measured rate of products.

    Args:
        sides: checked.
        lengths: of prompts, tokens.
        peer_most_tokens: longer prompts are left to the other sides.
        twin_most_tokens: longer prompts are not given to the twin, whose time grows with their
            square.
        repeats: timed runs of each side.
        report: called with each row as it is done.

    Returns:
        One row a length.
    """
    ours, twin = _servings(sides)
    rows = []
    for length in lengths:
        ids = random_ids(sides.config, 1, length)
        runs: dict[str, Callable[[], object]] = {
            "ours": partial(_first_token, ours, ids[0].tolist())
        }
        if length <= twin_most_tokens:
            runs["softmax_twin"] = partial(_first_token, twin, ids[0].tolist())
        if length <= peer_most_tokens:
            runs["transformers"] = partial(peer_prefill, sides.peer, ids.to(sides.device))
        times = interleaved_median_s(runs, repeats)
        row = _row(sides, length, times)
        report(row)
        rows.append(row)
    return rows


def _row(sides: Sides, length: int, times: Mapping[str, float]) -> dict[str, Any]:
    peer_s = times.get("transformers")
    return {
        "case": f"prefill 1 x {length:,}",
        "tokens": length,
        "ours_s": times["ours"],
        "ours_tokens_per_s": length / times["ours"],
        "softmax_twin_s": times.get("softmax_twin"),
        "transformers_s": peer_s,
        "transformers_tokens_per_s": None if peer_s is None else length / peer_s,
        "ratio": None if peer_s is None else peer_s / times["ours"],
        "floor_s": prefill_flops(sides.config, length) / sides.rates.flops_per_s,
    }


def _first_token(serving: Serving, prompt: list[int]) -> None:
    serving.submit(prompt, 1)
    serving.run()


def _servings(sides: Sides) -> tuple[Serving, Serving]:
    """Our engine and the twin's; on a GPU each with a share that leaves both their activations."""
    models, shares = (sides.model, _softmax_twin(sides)), (_OUR_SHARE, _TWIN_SHARE)
    budgets: list[int | None] = [None, None]
    if sides.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(sides.device)
        budgets = [int(share * free) for share in shares]
    ours, twin = (Serving(m, memory_bytes=b) for m, b in zip(models, budgets, strict=True))
    return ours, twin


def _softmax_twin(sides: Sides) -> HybridModel:
    layers = ("full_attention",) * sides.config.num_hidden_layers
    config = sides.config.model_copy(update={"layer_types": layers})
    with sides.device:
        twin = init_weights(HybridModel(config), seed=0, drawn_on=sides.device)
    return twin.to(sides.device, sides.model.dtype).eval().requires_grad_(False)
