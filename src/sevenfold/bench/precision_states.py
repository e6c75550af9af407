"""What fewer bits change in a head's output over thousands of tokens, at the real slopes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sevenfold.ops import (
    Int8ReplayPool,
    Noise,
    dequantise_rows,
    from_scaled_fp16,
    layer_log_decay,
    lightning_attention_replay_int8,
    noise_bits,
    quantise_rows,
    to_scaled_fp16,
)

LAYERS = (0, 40, 78)  # of the 80 of MiniMax-Text-01
HEADS = tuple(range(7, 64, 8))  # of its 64, the slowest among them
WIDTH = 64
SNAPSHOT_TOKENS = 512
RING_TOKENS = 16

Round = Callable[[Tensor, int], Tensor]


def run_state_benchmark(num_tokens: int = 4096) -> Iterator[dict[str, Any]]:
    """Give the relative error of the outputs of the last eighth, in the worst of eight heads.

    The inputs are random (SiLU of Gaussian q, k, v), the slopes those of MiniMax-Text-01: this
    shows a mechanism, and is no measurement of a model.

    Args:
        num_tokens: of the sequence.

    Yields:
        A row for each precision: its case, and the error in each of the layers.
    """
    errors: dict[str, dict[str, Any]] = {name: {"case": name} for name in _cases()}
    for layer in LAYERS:
        decay = layer_log_decay(64, layer, 80)[list(HEADS)]
        generator = torch.Generator().manual_seed(layer)
        draw = torch.randn(3, num_tokens, 1, len(HEADS), WIDTH, generator=generator)
        tokens = torch.nn.functional.silu(draw)
        exact = _run(tokens.double(), decay, _kept)
        for name, run in _cases().items():
            errors[name][f"layer_{layer}"] = _worst(run(tokens, decay), exact)
    yield from errors.values()


def _cases() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The outputs of tokens and decays in each precision."""
    rounds = {
        "states fp32": _kept,
        "snapshots fp16 every 512 tokens": _rarely(lambda s: from_scaled_fp16(*to_scaled_fp16(s))),
        "snapshots int8 every 512 tokens": _rarely(lambda s: dequantise_rows(*quantise_rows(s))),
        "states fp16, stochastic": _stochastic,
        "states fp16, to nearest": lambda s, t: from_scaled_fp16(*to_scaled_fp16(s)),
        "states bf16, to nearest": lambda s, t: s.bfloat16().float(),
        "states int8, every token": lambda s, t: dequantise_rows(*quantise_rows(s)),
    }
    cases = {name: partial(_run, round_state=round_state) for name, round_state in rounds.items()}
    return {**cases, "states int8, ring of 16": _run_ring}


def _kept(state: Tensor, t: int) -> Tensor:
    return state


def _rarely(round_state: Callable[[Tensor], Tensor]) -> Round:
    return lambda state, t: round_state(state) if (t + 1) % SNAPSHOT_TOKENS == 0 else state


def _stochastic(state: Tensor, t: int) -> Tensor:
    bits = noise_bits(Noise(torch.tensor([0]), torch.tensor([t]), 0), tuple(state.shape[1:]))
    return from_scaled_fp16(*to_scaled_fp16(state, bits))


def _run(tokens: Tensor, log_decay: Tensor, round_state: Round) -> Tensor:
    """The outputs [T, 1, H, V] of the recurrence, its state rounded after every token."""
    state = tokens.new_zeros(1, len(HEADS), WIDTH, WIDTH)
    decay = log_decay.to(tokens.dtype).exp()[:, None, None]
    outputs = []
    for t, (q, k, v) in enumerate(tokens.transpose(0, 1)):
        state = round_state(decay * state + k[..., :, None] * v[..., None, :], t)
        outputs.append((q[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs)


def _run_ring(tokens: Tensor, log_decay: Tensor) -> Tensor:
    H = len(HEADS)
    pool = Int8ReplayPool(
        torch.zeros(1, H, WIDTH, WIDTH, dtype=torch.int8),
        torch.zeros(1, H, WIDTH),
        torch.zeros(1, H, RING_TOKENS, WIDTH),
        torch.zeros(1, H, RING_TOKENS, WIDTH),
        torch.zeros(1, H, dtype=torch.int32),
    )
    slots = torch.tensor([0])
    step = lightning_attention_replay_int8
    return torch.stack(
        [step(q, k, v, log_decay, pool, slots) for q, k, v in tokens.transpose(0, 1)]
    )


def _worst(found: Tensor, exact: Tensor) -> float:
    """The largest relative error of a head's outputs over the last eighth of the tokens."""
    last = slice(-(len(exact) // 8), None)
    error = (found[last].double() - exact[last]).square().sum((0, 1, 3))
    return float((error / exact[last].square().sum((0, 1, 3))).max() ** 0.5)
