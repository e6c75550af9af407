"""States in int8 behind an exact ring: exact between two folds, and one rounding a fold."""

import torch

from sevenfold.ops import (
    Int8ReplayPool,
    dequantise_rows,
    layer_log_decay,
    lightning_attention_replay_int8,
    quantise_rows,
)
from sevenfold.ops.testing import check_error

H, D, R, SLOTS = 4, 8, 5, 6
# Slow heads, and one that forgets nothing.
DECAY = torch.cat([layer_log_decay(64, 78, 80)[[0, 40, 63]], torch.zeros(1)])


def pool() -> Int8ReplayPool:
    ring = torch.full((SLOTS, H, R, D), float("nan"))
    codes = torch.zeros(SLOTS, H, D, D, dtype=torch.int8)
    count = torch.zeros(SLOTS, H, dtype=torch.int32)
    return Int8ReplayPool(codes, torch.zeros(SLOTS, H, D), ring, ring.clone(), count)


def tokens(seed: int, num: int, B: int) -> torch.Tensor:
    draw = torch.randn(3, num, B, H, D, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.silu(draw)


def recurrence(S: torch.Tensor, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """One token in fp64."""
    decay = DECAY.double().exp()[:, None, None]
    S = decay * S + k.double()[..., :, None] * v.double()[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q.double(), S), S


def test_between_two_folds_nothing_is_lost() -> None:
    states, slots = pool(), torch.tensor([4, 1])
    start = torch.randn(2, H, D, D, generator=torch.Generator().manual_seed(3))
    states.write(slots, start)
    before = S32 = dequantise_rows(*quantise_rows(start))
    S = S32.double()
    for step, (q, k, v) in enumerate(tokens(0, 3 * R, 2).transpose(0, 1)):
        held = states.codes.clone()
        o = lightning_attention_replay_int8(q, k, v, DECAY, states, slots)
        if step and step % R == 0:
            # The fold: what was read last is what the state was folded into, rounded once.
            assert not torch.equal(held, states.codes)
            folded = quantise_rows(before)
            assert torch.equal(states.codes[slots], folded.codes)
            S = dequantise_rows(*folded).double()
            S32 = S.float()
            S = recurrence(S, q, k, v)[1]
        else:
            assert torch.equal(held, states.codes)
            exact, S = recurrence(S, q, k, v)
            S32 = DECAY.exp()[:, None, None] * S32 + k[..., :, None] * v[..., None, :]
            check_error("o", o, torch.einsum("bhk,bhkv->bhv", q, S32), exact)
        before = states.read(slots, DECAY)
    assert torch.equal(states.count[[4, 1], 0], torch.tensor([R, R], dtype=torch.int32))


def test_the_error_is_that_of_the_folds_and_no_more() -> None:
    """Each fold adds at most half a step of a row to each element, times the keys' sum."""
    states, slots, num = pool(), torch.tensor([2]), 40 * R
    S, peak = torch.zeros(1, H, D, D, dtype=torch.float64), torch.zeros(1, H, D)
    for step, (q, k, v) in enumerate(tokens(1, num, 1).transpose(0, 1)):
        o = lightning_attention_replay_int8(q, k, v, DECAY, states, slots)
        exact, S = recurrence(S, q, k, v)
        peak = torch.maximum(peak, S.abs().amax(-1).float())
        # 1 + 2^-6: the states that are rounded hold the errors of those before.
        bound = (q.abs() * peak).sum(-1) * (step // R) / 254 * (1 + 2**-6)
        assert (
            (o.double() - exact).abs().amax(-1) <= bound.double() + 2**-20 * S.abs().max()
        ).all()


def test_a_sequence_is_alone_in_any_batch_and_others_are_untouched() -> None:
    together, alone = pool(), pool()
    slots = torch.tensor([0, 3, 5])
    for q, k, v in tokens(2, 2 * R + 2, 3).transpose(0, 1):
        o = lightning_attention_replay_int8(q, k, v, DECAY, together, slots)
        one = lightning_attention_replay_int8(q[1:2], k[1:2], v[1:2], DECAY, alone, slots[2:])
        assert torch.equal(o[1:2], one)
    assert not together.codes[[1, 2, 4]].any()
    assert together.ring_k[[1, 2, 4]].isnan().all()
