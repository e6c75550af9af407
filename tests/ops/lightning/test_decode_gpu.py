"""What only a GPU shows of decoding: graphs, determinism, compilation, real sizes."""

from collections.abc import Callable

import pytest
import torch

from sevenfold.ops import (
    ReplayPool,
    layer_log_decay,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_replay,
    lightning_attention_verify,
)
from sevenfold.ops.testing import check_error

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*has no tuning")]

H, K, V, S = 64, 128, 128, 6
SLOTS = [5, 0, -1, 3]
KINDS = ["decode", "replay", "chain", "tree"]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


def new_pool(seed: int = 0) -> ReplayPool:
    pool = ReplayPool.zeros(S, H, (K, V), device="cuda")
    pool.state.copy_(torch.randn(pool.state.shape, generator=torch.Generator().manual_seed(seed)))
    return pool


class Call:
    """One call of a kind with inputs that stay where they are."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        lead = (len(SLOTS),) if kind in ("decode", "replay") else (len(SLOTS), 4)
        self.tokens = [randn(*lead, H, w, seed=i) for i, w in enumerate((K, K, V))]
        self.log_decay = layer_log_decay(H, 40, 80).cuda()
        self.slots = torch.tensor(SLOTS, device="cuda", dtype=torch.int32)
        self.accepted = torch.tensor([[0, 2, -1]] * len(SLOTS), device="cuda", dtype=torch.int32)
        sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]])
        self.sees = sees.bool().expand(len(SLOTS), 4, 4).cuda()

    def __call__(self, pool: ReplayPool) -> torch.Tensor:
        match self.kind:
            case "decode":
                run = lightning_attention_decode
                return run(*self.tokens, self.log_decay, pool.state, self.slots, impl="triton")
            case "replay":
                run = lightning_attention_replay
                return run(*self.tokens, self.log_decay, pool, self.slots, impl="triton")
            case _:
                return lightning_attention_verify(
                    *self.tokens,
                    self.log_decay,
                    pool,
                    self.slots,
                    accepted=self.accepted if self.kind == "tree" else self.accepted[:, :1],
                    ancestors=self.sees if self.kind == "tree" else None,
                    impl="triton",
                )


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        run()  # compiles, which a capture cannot hold
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def copy_pool(target: ReplayPool, source: ReplayPool) -> None:
    for a, b in zip(target.tensors(), source.tensors(), strict=True):
        a.copy_(b)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_replays_equal_calls(kind: str) -> None:
    call, plain, pool = Call(kind), new_pool(), new_pool()
    out: list[torch.Tensor] = []
    graph = captured(lambda: out.append(call(pool)))
    copy_pool(pool, plain)
    for step in range(40):
        for i, x in enumerate(call.tokens):
            x.copy_(randn(*x.shape, seed=3 * step + i))
        graph.replay()
        assert torch.equal(call(plain), out[-1])
    for name in ("state", "count"):
        assert torch.equal(getattr(plain, name), getattr(pool, name))


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_launches_give_the_same_bits(kind: str) -> None:
    call, start, pool = Call(kind), new_pool(), new_pool()
    for _ in range(15):  # a ring that is full at the next token, in part from drafts
        call(start)
    copy_pool(pool, start)
    first, after = call(pool).clone(), [x.clone() for x in pool.tensors()]
    differing = torch.zeros((), device="cuda", dtype=torch.int64)

    def once() -> None:
        copy_pool(pool, start)
        o = call(pool)
        differing.add_((o.view(torch.int16) != first.view(torch.int16)).sum())
        for x, y in zip(pool.tensors(), after, strict=True):
            differing.add_((x != y).sum())

    graph = captured(once)
    differing.zero_()
    for _ in range(10_000):
        graph.replay()
    assert differing.item() == 0


@pytest.mark.parametrize("layer", [0, 40, 78])
def test_hundreds_of_steps_at_full_size(layer: int) -> None:
    T, log_decay = 300, layer_log_decay(H, layer, 80).cuda()
    slots = torch.tensor(SLOTS, device="cuda")
    ring, plain = new_pool(), new_pool()
    exact, honest = plain.state.double(), plain.state.clone()
    outs: dict[str, list[torch.Tensor]] = {"ring": [], "plain": [], "exact": [], "honest": []}
    for t in range(T):
        x = [randn(len(SLOTS), H, w, seed=3 * t + i) for i, w in enumerate((K, K, V))]
        run = lightning_attention_decode
        outs["ring"].append(lightning_attention_replay(*x, log_decay, ring, slots))
        outs["plain"].append(run(*x, log_decay, plain.state, slots))
        outs["honest"].append(run(*x, log_decay, honest, slots, impl="eager"))
        x = [y.double() for y in x]
        outs["exact"].append(run(*x, log_decay, exact, slots, impl="eager"))
    lightning_attention_commit(log_decay, ring, slots)
    o = {name: torch.stack(y) for name, y in outs.items()}
    for name, state in (("ring", ring.state), ("plain", plain.state)):
        check_error(name, o[name], o["honest"], o["exact"])
        check_error(f"{name} state", state, honest, exact)


# Importing the compiler of torch 2.11 warns.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_whole_and_cold(kind: str) -> None:
    torch.compiler.reset()
    call, plain, pool = Call(kind), new_pool(), new_pool()

    @torch.compile(fullgraph=True)
    def step(pool: ReplayPool) -> torch.Tensor:
        return call(pool) * 2

    for _ in range(18):
        assert torch.equal(step(pool), call(plain) * 2)
    for x, y in zip(pool.tensors(), plain.tensors(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_the_kernels(kind: str) -> None:
    call, pool = Call(kind), new_pool()
    tail = (call.slots, 1.0, "triton")
    match kind:
        case "decode":
            op, rest = torch.ops.sevenfold.lightning_decode, (pool.state, *tail)
        case "replay":
            op, rest = torch.ops.sevenfold.lightning_replay, (pool.tensors(), *tail)
        case _:
            sees = call.sees if kind == "tree" else None
            op = torch.ops.sevenfold.lightning_verify
            rest = (pool.tensors(), call.slots, call.accepted, sees, *tail[1:])
    torch.library.opcheck(op.default, (*call.tokens, call.log_decay, *rest))


def test_a_pool_of_more_than_two_to_the_31_elements() -> None:
    S = 2**31 // (H * K * V) + 2
    state = torch.zeros(S, H, K, V, device="cuda")
    call = Call("decode")
    call.slots.copy_(torch.tensor([S - 1, 0, -1, 1]))
    o = lightning_attention_decode(*call.tokens, call.log_decay, state, call.slots)
    small = torch.zeros(3, H, K, V, device="cuda")
    few = torch.tensor([2, 0, -1, 1], device="cuda")
    assert torch.equal(o, lightning_attention_decode(*call.tokens, call.log_decay, small, few))
    assert torch.equal(state[-1], small[2])
    assert not state[2:-1].any()
