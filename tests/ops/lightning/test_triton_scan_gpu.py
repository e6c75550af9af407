"""What only a GPU shows of the scan kernels: repeats, graphs, compilation, sizes past 2^31."""

import numpy as np
import pytest
import torch
from lightning_statements import borders
from torch import Tensor

from sevenfold.ops import (
    Impl,
    PaddedSnapshots,
    Stop,
    layer_log_decay,
    lightning_attention,
    lightning_attention_padded,
    padded_cuts,
)
from sevenfold.ops.lightning import eager
from sevenfold.ops.lightning.api import default_impl
from sevenfold.ops.testing import check_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:lightning_scan has no tuning"),
]

H = 4
LAUNCHES = 10_000


def tokens(T: int, *, D: int = 128, heads: int = H, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    return [torch.randn(1, T, heads, D, **options) for _ in range(3)]


def decays(heads: int = H) -> Tensor:
    return layer_log_decay(heads, 40, 80).cuda()


@pytest.mark.parametrize(
    ("device", "dtype", "K", "V", "impl"),
    [
        ("cuda", torch.bfloat16, 128, 128, Impl.TRITON),
        ("cuda", torch.float16, 96, 256, Impl.TRITON),
        ("cuda", torch.float32, 128, 128, Impl.EAGER),
        ("cuda", torch.bfloat16, 257, 128, Impl.EAGER),
        ("cpu", torch.bfloat16, 128, 128, Impl.EAGER),
    ],
)
def test_the_default(device: str, dtype: torch.dtype, K: int, V: int, impl: Impl) -> None:
    assert default_impl(torch.device(device), dtype, K, V) is impl


@pytest.mark.parametrize("D", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("T", [1000, 9000])
def test_every_launch_gives_the_same_bits(T: int, D: int) -> None:
    q, k, v = (x.requires_grad_() for x in tokens(T, D=D))
    log_decay, do = decays(), tokens(T, D=D, seed=1)[0]

    def run() -> list[Tensor]:
        result = lightning_attention(q, k, v, log_decay, return_final_state=True)
        return [*result, *torch.autograd.grad(result.o, (q, k, v), do)]

    first, differing = run(), torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(LAUNCHES // 10):
        for a, b in zip(run(), first, strict=True):
            differing += (a != b).any()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        differing += (lightning_attention(q, k, v, log_decay).o != first[0]).any()
    for _ in range(LAUNCHES):
        graph.replay()
    assert int(differing) == 0


def test_a_graph_replays_what_it_captured() -> None:
    lengths = borders([0, 5000, 1, 4000])
    inputs, log_decay = tokens(9001), decays()

    def run() -> Tensor:
        return lightning_attention(*inputs, log_decay, cu_seqlens=lengths).o

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x, fresh in zip(inputs, tokens(9001, seed=5), strict=True):
        x.copy_(fresh)
    graph.replay()
    assert torch.equal(captured, run())


@pytest.mark.parametrize("T", [96, 256, 3072, 8192])
def test_a_graph_serves_every_length_of_its_row(T: int) -> None:
    heads = 16
    log_decay, state = decays(heads), torch.randn(1, heads, 128, 128, device="cuda")
    q, k, v = tokens(T, heads=heads)
    cuts = padded_cuts(T, (heads, 128, 128), 4, q)
    numbers = torch.zeros(cuts.num_numbers, dtype=torch.int32, device="cuda")
    pool, states = (torch.zeros(4, heads, 128, 128, device="cuda") for _ in range(2))
    slots = torch.tensor([2], device="cuda")
    padded = PaddedSnapshots(pool, cuts.plan(numbers))
    rows = [x.clone() for x in (q, k, v)]

    def run() -> Tensor:
        return lightning_attention_padded(
            *rows, log_decay, padded, states, slots, initial_state=state
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for length in (T, 1, T // 2, T // 2 + 1, T - 1, 64, 65, T):
        host = np.zeros(cuts.num_numbers, np.int64)
        stops = tuple(Stop(0, at, n) for n, at in enumerate(sorted({1, length // 3 + 1, length})))
        cuts.write(host, length, stops)
        numbers.copy_(torch.from_numpy(host))
        for row, x in zip(rows, (q, k, v), strict=True):
            row.copy_(x)
            row[:, length:] = float("nan")
        graph.replay()
        part = [x[:, :length] for x in (q, k, v)]
        options = {"scale": 1.0, "initial_state": state, "lengths": (length,)}
        honest = eager.forward(*part, log_decay, **options)
        exact_options = options | {"initial_state": state.double()}
        exact = eager.forward(*(x.double() for x in part), log_decay, **exact_options)
        check_error(f"o of {length}", captured[:, :length], honest[0], exact[0])
        check_error(f"final of {length}", states[slots], honest[1].bfloat16(), exact[1])
        assert torch.equal(pool[len(stops) - 1], states[2])
        for _, at, slot in stops:
            prefix = [x[:, :at] for x in part]
            here = options | {"lengths": (at,)}
            near = eager.forward(*prefix, log_decay, **here)[1].bfloat16()
            true = exact_options | {"lengths": (at,)}
            wanted = eager.forward(*(x.double() for x in prefix), log_decay, **true)[1]
            check_error(f"after {at} of {length}", pool[slot : slot + 1], near, wanted)


def test_compiled_in_one_graph_from_cold() -> None:
    leaves = [x.requires_grad_() for x in tokens(300)]
    state = torch.randn(3, H, 128, 128, device="cuda", requires_grad=True)
    log_decay, lengths = decays(), borders([100, 0, 200])

    def loss(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
        options = {"initial_state": state, "cu_seqlens": lengths, "return_final_state": True}
        o, final = lightning_attention(q, k, v, log_decay, **options)
        return o.float().square().sum() + final.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves, state), [*leaves, state])
    expected = torch.autograd.grad(loss(*leaves, state), [*leaves, state])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("D", [96, 128, 256])
def test_past_two_to_the_31_elements(D: int) -> None:
    heads, T, seen = 64, 2**31 // (64 * D) + 5000, 4096
    q, k, v = tokens(T, D=D, heads=heads)
    log_decay = torch.full((heads,), -0.05, device="cuda")
    o = lightning_attention(q, k, v, log_decay).o
    last = [x[:, -seen:] for x in (q, k, v)]
    options = {"scale": 1.0, "initial_state": None, "lengths": (seen,)}
    honest = eager.forward(*last, log_decay, **options)[0][:, -64:]
    exact = eager.forward(*(x.double() for x in last), log_decay, **options)[0][:, -64:]
    check_error("o", o[:, -64:], honest, exact)


def test_backward_memory_per_token_and_head() -> None:
    T, heads = 65536, 8
    q, k, v = (x.requires_grad_() for x in tokens(T, heads=heads))
    log_decay, do = decays(heads), tokens(T, heads=heads, seed=1)[0]
    o = lightning_attention(q, k, v, log_decay).o
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(o, (q, k, v), do)
    extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
    assert extra <= 16 * T * heads
