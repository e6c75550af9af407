"""Every rule of the decoding operators' arguments, with its message; their registration."""

import re

import pytest
import torch
from decode_cases import spread

from sevenfold.config import UnsupportedError
from sevenfold.ops import (
    ReplayPool,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_replay,
    lightning_attention_verify,
)
from sevenfold.ops.types import Impl

B, T, H, K, V, S = 2, 3, 4, 5, 6, 3
META = torch.device("meta")


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


DECODE = {
    "q": tokens(B, H, K),
    "k": tokens(B, H, K),
    "v": tokens(B, H, V),
    "log_decay": torch.zeros(H),
    "slots": torch.zeros(B, dtype=torch.int32),
}


def new_pool(R: int = 4, dtype: torch.dtype = torch.float32) -> ReplayPool:
    return ReplayPool.zeros(S, H, (K, V), ring_tokens=R, dtype=dtype)


def changed(**parts: torch.Tensor) -> ReplayPool:
    whole = dict(zip(("state", "ring_k", "ring_v", "count"), new_pool().tensors(), strict=True))
    return ReplayPool(**(whole | parts))


WRONG_TOKENS = [
    ({"q": tokens(B, K)}, ValueError, "q must have shape [B, H, K], got [2, 5]"),
    ({"k": tokens(B, H, 6)}, ValueError, "k must have shape [B, H, K] = [2, 4, 5], got [2, 4, 6]"),
    ({"v": tokens(H, V)}, ValueError, "v must have shape [B, H, V], got [4, 6]"),
    ({"v": tokens(B, 1, V)}, ValueError, "v must have shape [B, H, V] = [2, 4, 6], got [2, 1, 6]"),
    ({"k": tokens(B, H, K).half()}, TypeError, "k must be torch.float32, got torch.float16"),
    ({"v": tokens(B, H, V).to(META)}, ValueError, "v must lie on cpu, got meta"),
    ({"log_decay": torch.zeros(3)}, ValueError, "log_decay must have shape [H] = [4], got [3]"),
    (
        {"log_decay": torch.zeros(H).double()},
        TypeError,
        "log_decay must be torch.float32, got torch.float64",
    ),
    ({"slots": torch.zeros(3).int()}, ValueError, "slots must have shape [B] = [2], got [3]"),
    (
        {"slots": torch.zeros(B)},
        TypeError,
        "slots must be torch.int32 or torch.int64, got torch.float32",
    ),
    ({"slots": torch.zeros(B).int().to(META)}, ValueError, "slots must lie on cpu, got meta"),
    (
        {"impl": "fast"},
        ValueError,
        f"impl must be one of {', '.join(Impl)}, got 'fast'",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG_TOKENS, ids=lambda x: str(x)[:50])
def test_wrong_tokens(changes: dict, error: type[Exception], message: str) -> None:
    for op, pool in (
        (lightning_attention_decode, torch.zeros(S, H, K, V)),
        (lightning_attention_replay, new_pool()),
    ):
        with pytest.raises(error, match=re.escape(message)):
            op(**(DECODE | {"pool": pool} | changes))


@pytest.mark.parametrize(
    ("pool", "error", "message"),
    [
        (torch.zeros(H, K, V), ValueError, "pool must have shape [S, H, K, V], got [4, 5, 6]"),
        (
            torch.zeros(S, H, V, K),
            ValueError,
            "pool must have shape [S, H, K, V] = [3, 4, 5, 6], got [3, 4, 6, 5]",
        ),
        (
            torch.zeros(S, H, K, V).bfloat16(),
            TypeError,
            "pool must be torch.float32, got torch.bfloat16",
        ),
        (torch.zeros(S, H, K, V, device=META), ValueError, "pool must lie on cpu, got meta"),
        (
            torch.zeros(S, H, V, K).mT,
            ValueError,
            "pool must be contiguous within a slot and its slots must not overlap, got shape "
            "[3, 4, 5, 6] with strides [120, 30, 1, 5]",
        ),
    ],
)
def test_wrong_pool_of_states(pool: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        lightning_attention_decode(**(DECODE | {"pool": pool}))


def test_slots_that_overlap() -> None:
    pool = torch.zeros(1, H, K, V).expand(S, H, K, V)
    with pytest.raises(ValueError, match=re.escape("with strides [0, 30, 6, 1]")):
        lightning_attention_decode(**(DECODE | {"pool": pool}))


@pytest.mark.parametrize(
    ("pool", "error", "message"),
    [
        (
            changed(state=torch.zeros(S, H, V, K)),
            ValueError,
            "pool.state must have shape [S, H, K, V] = [3, 4, 5, 6], got [3, 4, 6, 5]",
        ),
        (
            changed(ring_k=torch.zeros(S, H, 4, V)),
            ValueError,
            "pool.ring_k must have shape [S, H, R, K] = [3, 4, 4, 5], got [3, 4, 4, 6]",
        ),
        (
            changed(ring_v=torch.zeros(S, H, 3, V)),
            ValueError,
            "pool.ring_v must have shape [S, H, R, V] = [3, 4, 4, 6], got [3, 4, 3, 6]",
        ),
        (
            changed(count=torch.zeros(S).int()),
            ValueError,
            "pool.count must have shape [S, H] = [3, 4], got [3]",
        ),
        (
            changed(count=torch.zeros(S, H)),
            TypeError,
            "pool.count must be torch.int32, got torch.float32",
        ),
        (
            new_pool(dtype=torch.bfloat16),
            TypeError,
            "pool.ring_k must be torch.float32, got torch.bfloat16",
        ),
        (
            changed(count=torch.zeros(S, H, device=META).int()),
            ValueError,
            "pool.count must lie on cpu, got meta",
        ),
        (
            changed(ring_v=torch.zeros(S, H, V, 4).mT),
            ValueError,
            "pool.ring_v must be contiguous within a slot and its slots must not overlap, got "
            "shape [3, 4, 4, 6] with strides [96, 24, 1, 4]",
        ),
    ],
)
def test_wrong_replay_pool(pool: ReplayPool, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        lightning_attention_replay(**(DECODE | {"pool": pool}))


def draft(T: int = T, **changes: object) -> dict:
    x = {"q": tokens(B, T, H, K), "k": tokens(B, T, H, K), "v": tokens(B, T, H, V)}
    return DECODE | x | {"pool": new_pool()} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": tokens(B, H, K)}, ValueError, "q must have shape [B, T, H, K], got [2, 4, 5]"),
        ({"pool": new_pool(2)}, ValueError, "T must lie in 1 to 2, got 3"),
        (draft(17, pool=new_pool(20)), ValueError, "T must lie in 1 to 16, got 17"),
        (draft(0), ValueError, "T must lie in 1 to 4, got 0"),
        (
            {"accepted": torch.zeros(B).int()},
            ValueError,
            "accepted must have shape [B, A], got [2]",
        ),
        (
            {"accepted": torch.zeros(3, 1).int()},
            ValueError,
            "accepted must have shape [B, A] = [2, 1], got [3, 1]",
        ),
        (
            {"accepted": torch.zeros(B, 1).long()},
            TypeError,
            "accepted must be torch.int32, got torch.int64",
        ),
        (
            {"ancestors": torch.zeros(B, T, 2).bool()},
            ValueError,
            "ancestors must have shape [B, T, T] = [2, 3, 3], got [2, 3, 2]",
        ),
        (
            {"ancestors": torch.zeros(B, T, T)},
            TypeError,
            "ancestors must be torch.bool, got torch.float32",
        ),
    ],
    ids=lambda x: str(x)[:50],
)
def test_wrong_draft(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        lightning_attention_verify(**(draft() | changes))


def test_wrong_commit() -> None:
    slots = torch.zeros(B, dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape("log_decay must have shape [H] = [4], got [3]")):
        lightning_attention_commit(torch.zeros(3), new_pool(), slots)
    with pytest.raises(ValueError, match=re.escape("accepted must have shape [B, A], got [2]")):
        lightning_attention_commit(torch.zeros(H), new_pool(), slots, accepted=slots)


def test_a_named_implementation_never_falls_back() -> None:
    pytest.importorskip("triton")
    for op, pool in (
        (lightning_attention_decode, torch.zeros(S, H, K, V)),
        (lightning_attention_replay, new_pool()),
    ):
        with pytest.raises(
            UnsupportedError, match="impl 'triton' must run on a CUDA device, got cpu"
        ):
            op(**(DECODE | {"pool": pool, "impl": "triton"}))
        with pytest.raises(UnsupportedError, match="must use impl reference, eager, triton, got"):
            op(**(DECODE | {"pool": pool, "impl": "onednn"}))
    half, slots = new_pool(dtype=torch.float16), torch.tensor([0])
    with pytest.raises(UnsupportedError, match="k must be fp32 on a CPU, not empty, for impl num"):
        lightning_attention_commit(torch.zeros(H), half, slots, impl="numba")


def arguments(op: str, impl: str, apart: bool) -> tuple:
    x = [torch.randn(B, H, w) for w in (K, K, V)]
    slots, log_decay = torch.tensor([2, 0]), torch.full((H,), -0.1)
    pool = [spread(x) for x in new_pool().tensors()] if apart else new_pool().tensors()
    accepted = torch.zeros(B, 1, dtype=torch.int32)
    match op:
        case "lightning_decode":
            return (*x, log_decay, pool[0], slots, 1.0, impl)
        case "lightning_replay":
            return (*x, log_decay, pool, slots, 1.0, impl)
        case "lightning_verify":
            drafted = (y.unsqueeze(1) for y in x)
            return (*drafted, log_decay, pool, slots, accepted, None, 1.0, impl)
        case _:
            return (log_decay, pool, slots, accepted, impl)


@pytest.mark.parametrize(("impl", "apart"), [("reference", False), ("eager", True)])
@pytest.mark.parametrize(
    "op", ["lightning_decode", "lightning_replay", "lightning_verify", "lightning_commit"]
)
def test_opcheck(op: str, impl: str, apart: bool) -> None:
    torch.library.opcheck(getattr(torch.ops.sevenfold, op).default, arguments(op, impl, apart))


@pytest.mark.parametrize("op", ["lightning_verify", "lightning_commit"])
def test_opcheck_of_compiled_loops(op: str) -> None:
    of = getattr(torch.ops.sevenfold, op).default
    torch.library.opcheck(of, arguments(op, "numba", apart=True))


def test_compiled_whole() -> None:
    def run(pool: ReplayPool, states: torch.Tensor) -> torch.Tensor:
        x = [torch.ones(B, H, w) for w in (K, K, V)]
        log_decay, slots = torch.full((H,), -0.1), torch.tensor([2, 0])
        o = lightning_attention_decode(*x, log_decay, states, slots)
        o = o + lightning_attention_replay(*x, log_decay, pool, slots)
        drafted = [y.unsqueeze(1).expand(-1, 2, -1, -1) for y in x]
        o = o + lightning_attention_verify(*drafted, log_decay, pool, slots).sum(1)
        lightning_attention_commit(log_decay, pool, slots)
        return o

    found, wanted = (new_pool(), torch.ones(S, H, K, V)), (new_pool(), torch.ones(S, H, K, V))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(compiled(*found), run(*wanted))
    assert torch.equal(found[0].state, wanted[0].state)
    assert torch.equal(found[1], wanted[1])
