"""States in fewer bits on any device: what calls mean and refuse, how they are registered."""

import re

import pytest
import torch
from int8_cases import Int8Course

from sevenfold.config import UnsupportedError
from sevenfold.ops import (
    EncodedHeads,
    Int8ReplayPool,
    Noise,
    ScaledFp16,
    decode_states,
    encode_states,
    from_scaled_fp16,
    lightning_attention_commit_int8,
    lightning_attention_decode,
    lightning_attention_decode_fp16,
    lightning_attention_replay_int8,
    lightning_attention_verify_int8,
    noise_bits,
    quantise_rows,
    to_scaled_fp16,
)

B, T, H, K, V, S, R = 2, 3, 4, 5, 6, 3, 4


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def int8_pool(dtype: torch.dtype = torch.float32) -> Int8ReplayPool:
    codes, scale = quantise_rows(randn(S, H, K, V))
    rings = (torch.zeros(S, H, R, w, dtype=dtype) for w in (K, V))
    return Int8ReplayPool(codes, scale, *rings, torch.zeros(S, H, dtype=torch.int32))


def tokens(*lead: int) -> dict[str, torch.Tensor]:
    widths = {"q": K, "k": K, "v": V}
    return {name: randn(*lead, H, w, seed=n) for n, (name, w) in enumerate(widths.items())}


DECAY, SLOTS = -torch.rand(H, generator=torch.Generator().manual_seed(9)), torch.tensor([2, 0])
NOISE = Noise(torch.tensor([4, 5]), torch.tensor([1, 9]), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_course_of_calls_over_int8_states(dtype: torch.dtype) -> None:
    course = Int8Course("eager", (8, 12, 5), dtype, "cpu", seed=3)
    course.run(60)
    assert course.folds


def test_fp16_decoding_is_decoding_and_a_rounding_by_the_noise() -> None:
    pool, slots = to_scaled_fp16(randn(S, H, K, V)), torch.tensor([2, -1, 0])
    states, x = from_scaled_fp16(*pool), tokens(3)
    noise = Noise(torch.tensor([4, 0, 5]), torch.tensor([1, 2, 9]), 3)
    kept = [part[1].clone() for part in pool]
    o = lightning_attention_decode_fp16(**x, log_decay=DECAY, pool=pool, slots=slots, noise=noise)
    wanted = lightning_attention_decode(**x, log_decay=DECAY, pool=states, slots=slots)
    assert torch.equal(o, wanted)
    bits = noise_bits(noise, (H, K, V))
    for n, slot in ((0, 2), (2, 0)):
        held = to_scaled_fp16(states[slot], bits[n])
        assert torch.equal(pool.codes[slot], held.codes)
        assert torch.equal(pool.scale[slot], held.scale)
    assert torch.equal(pool.codes[1], kept[0])
    assert torch.equal(pool.scale[1], kept[1])


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "int8"])
def test_heads_are_written_and_read_where_they_lie(kind: str) -> None:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    shapes = {"fp16": (S, 2), "int8": (S, 2, K)}
    codes = torch.zeros(S, 2, K, V, dtype=dtypes.get(kind, torch.int8))
    scale = torch.zeros(shapes[kind]) if kind in shapes else None
    held, states = EncodedHeads(codes, scale, torch.tensor([3, 1])), randn(5, H, K, V)
    encode_states(states, torch.tensor([4, 2]), held, SLOTS)
    own = states[[4, 2]][:, [3, 1]]
    match kind:
        case "fp16":
            wanted = from_scaled_fp16(*to_scaled_fp16(own))
        case "int8":
            rows = quantise_rows(own)
            wanted = rows.codes * rows.scale[..., None]
        case _:
            wanted = own.to(dtypes[kind]).float()
    back = torch.full((S, H, K, V), 7.0)
    decode_states(held, SLOTS, back, torch.tensor([0, 1]))
    assert torch.equal(back[:2, [3, 1]], wanted)
    back[:2, [3, 1]] = 7
    assert bool((back == 7).all())


CALLS = {
    "decode_fp16": lambda **x: lightning_attention_decode_fp16(
        **{**tokens(B), "log_decay": DECAY, "slots": SLOTS, "noise": NOISE,
           "pool": to_scaled_fp16(randn(S, H, K, V))} | x),
    "replay_int8": lambda **x: lightning_attention_replay_int8(
        **{**tokens(B), "log_decay": DECAY, "slots": SLOTS, "pool": int8_pool()} | x),
    "verify_int8": lambda **x: lightning_attention_verify_int8(
        **{**tokens(B, T), "log_decay": DECAY, "slots": SLOTS, "pool": int8_pool()} | x),
    "commit_int8": lambda **x: lightning_attention_commit_int8(
        **{"log_decay": DECAY, "slots": SLOTS, "pool": int8_pool()} | x),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_named_kernel_never_falls_back(call) -> None:
    call()
    with pytest.raises(UnsupportedError, match="impl 'triton' must run on a CUDA device, got cpu"):
        call(impl="triton")
    with pytest.raises(UnsupportedError, match="must use impl eager, triton, got 'reference'"):
        call(impl="reference")


def wrong_pool(**parts: torch.Tensor) -> Int8ReplayPool:
    names = ("codes", "scale", "ring_k", "ring_v", "count")
    pool = int8_pool()
    return Int8ReplayPool(**({name: getattr(pool, name) for name in names} | parts))


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("decode_fp16", {"pool": ScaledFp16(torch.zeros(S, H, K, V), torch.zeros(S, H))}, TypeError,
         "pool.codes must be torch.float16, got torch.float32"),
        ("decode_fp16", {"pool": ScaledFp16(torch.zeros(S, H, K, V).half(), torch.zeros(S))},
         ValueError, "pool.scale must have shape [S, H] = [3, 4], got [3]"),
        ("decode_fp16", {"noise": Noise(NOISE.key[:1], NOISE.position, 0)}, ValueError,
         "noise.key must have shape [B] = [2], got [1]"),
        ("decode_fp16", {"noise": Noise(NOISE.key, NOISE.position.int(), 0)}, TypeError,
         "noise.position must be torch.int64, got torch.int32"),
        ("replay_int8", {"pool": wrong_pool(codes=torch.zeros(S, H, K, V))}, TypeError,
         "pool.codes must be torch.int8, got torch.float32"),
        ("replay_int8", {"pool": wrong_pool(scale=torch.zeros(S, H))}, ValueError,
         "pool.scale must have shape [S, H, K] = [3, 4, 5], got [3, 4]"),
        ("verify_int8", {"pool": int8_pool(torch.float16)}, TypeError,
         "pool.ring_k must be torch.float32, got torch.float16"),
        ("verify_int8", tokens(B, R + 1), ValueError, "T must lie in 1 to 4, got 5"),
        ("verify_int8", {"accepted": torch.zeros(B, 1).long()}, TypeError,
         "accepted must be torch.int32, got torch.int64"),
        ("commit_int8", {"log_decay": torch.zeros(3)}, ValueError,
         "log_decay must have shape [H] = [4], got [3]"),
    ],
)  # fmt: skip
def test_wrong_arguments(name: str, changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        CALLS[name](**changes)


@pytest.mark.parametrize(
    ("held", "error", "message"),
    [
        (EncodedHeads(torch.zeros(S, H, V, K)), ValueError,
         "states must have shape [S, H, K, V] = [3, 4, 6, 5], got [3, 4, 5, 6]"),
        (EncodedHeads(torch.zeros(S, H, K, V).int()), TypeError,
         "held.codes must be torch.float16 or torch.int8 or torch.float32 or torch.bfloat16, got"),
        (EncodedHeads(torch.zeros(S, H, K, V).char()), ValueError,
         "held.scale must have shape (3, 4, 5) beside torch.int8, got None"),
        (EncodedHeads(torch.zeros(S, H, K, V), torch.zeros(S, H)), ValueError,
         "held.scale must have shape None beside torch.float32, got [3, 4]"),
        (EncodedHeads(torch.zeros(S, H, K, V).half(), torch.zeros(S)), ValueError,
         "held.scale must have shape [S, h] or [S, h, K] = [3, 4], got [3]"),
    ],
)  # fmt: skip
def test_wrong_states(held: EncodedHeads, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        encode_states(torch.zeros(S, H, K, V), SLOTS, held, SLOTS)
    with pytest.raises(UnsupportedError, match="impl 'triton' must run on a CUDA device, got cpu"):
        encode_states(
            torch.zeros(S, H, K, V),
            SLOTS,
            EncodedHeads(torch.zeros(S, H, K, V)),
            SLOTS,
            impl="triton",
        )


def operator_arguments(name: str) -> tuple:
    x, pool = tuple(tokens(B).values()), int8_pool().tensors()
    match name:
        case "lightning_decode_fp16":
            held = list(to_scaled_fp16(randn(S, H, K, V)))
            return (*x, DECAY, held, SLOTS, [NOISE.key, NOISE.position], 3, 1.0, "eager")
        case "lightning_replay_int8":
            return (*x, DECAY, pool, SLOTS, 1.0, "eager")
        case "lightning_verify_int8":
            return (*tokens(B, T).values(), DECAY, pool, SLOTS, None, None, 1.0, "eager")
        case "lightning_commit_int8":
            return (DECAY, pool, SLOTS, None, "eager")
        case "encode_states":
            codes, scale = quantise_rows(randn(S, H, K, V))
            states = randn(S, H, K, V, seed=4)
            return (states, SLOTS, codes, scale, None, SLOTS, None, None, 0, "eager")
        case _:
            held = quantise_rows(randn(S, H, K, V))
            return (*held, None, SLOTS, torch.zeros(S, H, K, V), SLOTS, "eager")


@pytest.mark.parametrize(
    "name",
    [
        "lightning_decode_fp16",
        "lightning_replay_int8",
        "lightning_verify_int8",
        "lightning_commit_int8",
        "encode_states",
        "decode_states",
    ],
)
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.sevenfold, name).default
    torch.library.opcheck(operator, operator_arguments(name))
