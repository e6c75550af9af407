"""Check and time half-layers of a few rows: few_rows.py OUT.json [sweep | steps] [ROWS ...]

Checks every kernel by the error rule at bench-2b's widths, times each in CUDA graphs over weights
that the L2 cannot hold, and compares with its floor, bytes / 4.27e12; then whole decoding steps of
bench-2b: by rows, with launches that overlap and without, which must give the same bits, and layer
by layer. "sweep" tries launch configurations of each kernel by itself instead and prints the best
of each key in the form of ops/tuning/*.json; "steps" tries those of a step of one token in the
whole step, where launches overlap. Numbers of rows limit the first two to these.
"""

import json
import multiprocessing
import statistics
import sys
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

from sevenfold import ops
from sevenfold.models import Batch, HybridModel, PagedKV, PageTable, PooledState, hybrid, preset
from sevenfold.ops import overlap
from sevenfold.ops.few_rows import (
    logits_on_device,
    tiles,
    triton_alone,
    triton_experts,
    triton_linear,
)
from sevenfold.ops.few_rows.triton_router import Choice, choose
from sevenfold.ops.rms_norm.triton_rms_norm import normed as normed_rows
from sevenfold.ops.testing import check_error

warnings.filterwarnings("ignore", ".*has no tuning.*")
RATE = 4.27e12
BEGAN = time.perf_counter()
DEADLINE_S = 200
GPU, LOW = torch.device("cuda"), torch.bfloat16
HIDDEN, H, D, WIDTH, E, CHOSEN, VOCAB = 2048, 16, 128, 1792, 8, 2, 32000
POST = ops.Residual(1.5, 0.75, post_norm=True)
CHECKED, ROWS = (1, 3, 8, 17, 64, 100, 128), (1, 8, 64, 128)
rows_out, failures = [], []


def left():
    return DEADLINE_S - (time.perf_counter() - BEGAN)


def randn(*shape, seed=0, dtype=None):
    generator = torch.Generator(GPU).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=GPU, dtype=dtype or LOW)


def weight(*shape, seed=0):
    return randn(*shape, seed=seed) * shape[-1] ** -0.5


def norm(width, seed=0):
    return ops.Norm(1 + 0.25 * randn(width, seed=seed), 1e-5)


def graph_s(calls, replays=10):
    """Seconds of one call, from a graph of all of them in a row."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(replays):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) / 1000 / len(calls))
    return statistics.median(times)


def note(case, seconds, floor, **more):
    row = {"case": case, "us": seconds * 1e6, "floor_us": floor * 1e6, "ratio": seconds / floor}
    rows_out.append(row | more)
    print(
        f"{case:40s} {row['us']:9.2f} us  floor {row['floor_us']:8.2f}  x{row['ratio']:.2f}",
        flush=True,
    )


def attempt(name, run, *args):
    if left() < 0:
        failures.append(f"SKIPPED (time) {name}")
        return
    try:
        run(*args)
    except Exception as error:
        text = str(error).splitlines()[0][:200] if str(error) else repr(error)
        failures.append(f"FAILED {name}: {text}")
        traceback.print_exc(limit=6)


def copies(bytes_each):
    return max(2, min(40, int(2.4e8 // bytes_each)))


# ------------------------------------------------------------------ kernels, each in a given tile


def lightning_weights(seed):
    return ops.LightningWeights(
        weight(3 * H * D, HIDDEN, seed=seed),
        weight(H * D, HIDDEN, seed=seed + 1),
        norm(H * D, seed),
        weight(HIDDEN, H * D, seed=seed + 2),
        torch.zeros(H, device=GPU),
    )


class Project:
    """Norm, qkv and gate of lightning attention."""

    def __init__(self, M, num=None):
        size = 4 * H * D * HIDDEN
        self.floor = (2 * size + 2 * M * (HIDDEN + 4 * H * D)) / RATE
        self.x, self.norm = randn(M, HIDDEN), norm(HIDDEN)
        self.held = [lightning_weights(n)[:2] for n in range(num or copies(2 * size))]
        self.default = tiles.linear_tile(M, self.held[0][0], 4 * H * D)

    def run(self, n, tile):
        return triton_linear.project_lightning(self.x, self.norm, self.held[n], H, tile)


class Join:
    """Gated norm and output projection of lightning attention, and the residual."""

    def __init__(self, M, num=None):
        size = HIDDEN * H * D
        self.floor = (2 * size + 2 * M * (2 * HIDDEN + H * D)) / RATE
        self.o, self.stream = randn(M, H * D), randn(M, HIDDEN, seed=2)
        self.by = triton_linear.GatedNorm(norm(H * D), randn(M, H * D, seed=3))
        self.held = [weight(HIDDEN, H * D, seed=n) for n in range(num or copies(2 * size))]
        self.default = tiles.linear_tile(M, self.held[0], HIDDEN)

    def run(self, n, tile):
        return triton_linear.join(self.o, self.held[n], self.stream, POST, tile, self.by)


class Head:
    def __init__(self, M, num=None):
        size = VOCAB * HIDDEN
        self.floor = (2 * size + 2 * M * HIDDEN + 4 * M * VOCAB) / RATE
        self.x = randn(M, HIDDEN)
        self.held = [weight(VOCAB, HIDDEN, seed=n) for n in range(num or copies(2 * size))]
        self.default = tiles.linear_tile(M, self.held[0], VOCAB)

    def run(self, n, tile):
        return triton_linear.product(self.x, self.held[n], torch.float32, tile)


class Experts:
    """Choices of M tokens by a random router; a ring of weights beyond the L2."""

    def __init__(self, M, shape, num):
        self.u = randn(M, HIDDEN)
        shares, experts = ops.route(randn(M, E, seed=3, dtype=torch.float32), CHOSEN)
        self.choice, self.M = Choice(self.u, experts.int(), shares), M
        self.used = len(experts.unique())
        size = 2 * shape[1] * shape[2]
        self.held = [weight(*shape, seed=n) for n in range(num or copies(size * self.used))]
        self.floor = self.used * size / RATE


class GateUp(Experts):
    def __init__(self, M, num=None):
        super().__init__(M, (E, 2 * WIDTH, HIDDEN), num)
        self.default = tiles.gate_up_tile(M * CHOSEN, self.held[0])
        if M <= triton_experts._ALONE:
            self.default = tiles.alone_tiles(self.held[0], self.held[0])[0]

    def run(self, n, tile):
        kernels = triton_alone if self.M <= triton_experts._ALONE else triton_experts
        return kernels.gate_up(self.choice, self.held[n], tile)


class Dense:
    """The first product of a SwiGLU without experts."""

    def __init__(self, M, num=None):
        size = 2 * WIDTH * HIDDEN
        self.floor = (2 * size + 2 * M * (HIDDEN + WIDTH)) / RATE
        self.x = randn(M, HIDDEN)
        self.held = [weight(2 * WIDTH, HIDDEN, seed=n) for n in range(num or copies(2 * size))]
        self.default = tiles.gate_up_tile(M, self.held[0][None])

    def run(self, n, tile):
        return triton_experts.dense_gate_up(self.x, self.held[n], tile)


class Down(Experts):
    """With its sum and residual."""

    def __init__(self, M, num=None):
        super().__init__(M, (E, HIDDEN, WIDTH), num)
        self.hidden = randn(M * CHOSEN, WIDTH)
        self.default = tiles.down_tile(M * CHOSEN, self.held[0])
        if M <= triton_experts._ALONE:
            self.default = tiles.alone_tiles(self.held[0], self.held[0])[1]

    def run(self, n, tile):
        if self.M <= triton_experts._ALONE:
            args = (self.hidden, self.choice, self.held[n], self.u, POST, tile)
            return triton_alone.down(*args)
        rows = triton_experts.down(self.hidden, self.choice, self.held[n], tile)
        return triton_experts.total(rows, self.u, POST)


KERNELS = {
    "project": Project,
    "join": Join,
    "head": Head,
    "gate_up": GateUp,
    "down": Down,
    "dense": Dense,
}


def calls_of(case, tile):
    return [lambda n=n: case.run(n, tile) for n in range(len(case.held))]


def time_kernel(name, M):
    case = KERNELS[name](M)
    seconds = graph_s(calls_of(case, case.default))
    note(f"{name} M={M}", seconds, case.floor, tile=str(case.default))


def time_small(M):
    """Norms, the router, the sum of the choices, and the choice of a token: no large weight."""
    x, by = randn(M, HIDDEN), norm(HIDDEN)
    routers = [randn(E, HIDDEN, seed=n, dtype=torch.float32) for n in range(400)]
    floor = (4 * E * HIDDEN + 4 * M * HIDDEN) / RATE
    note(f"choose M={M}", graph_s([lambda r=r: choose(x, by, r, CHOSEN) for r in routers]), floor)
    rows, logits = (randn(n, w, dtype=torch.float32) for n, w in ((M * CHOSEN, HIDDEN), (M, VOCAB)))
    floor = 4 * M * VOCAB / RATE
    for impl in ("eager", "triton"):
        calls = [lambda impl=impl: ops.greedy_tokens(logits, impl=impl)] * 40
        note(f"greedy by {impl} M={M}", graph_s(calls), floor)
    floor = 4 * M * HIDDEN / RATE
    note(f"norm M={M}", graph_s([lambda: normed_rows(x, None, *by)] * 40), floor)
    note(f"gated norm M={M}", graph_s([lambda: normed_rows(x, x, *by)] * 40), floor)
    note(f"total M={M}", graph_s([lambda: triton_experts.total(rows, x, POST)] * 40), floor)


def time_experts(M):
    """Both products of the experts, as a step runs them."""
    first, second = GateUp(M), Down(M)
    pairs = list(zip(first.held, second.held, strict=False))
    choice, floor = first.choice, 3 * first.used * 2 * HIDDEN * WIDTH / RATE

    def feed(gate_up, down):
        return triton_experts.feed(choice, gate_up, down, first.u, POST)

    note(f"experts M={M}", graph_s([lambda p=p: feed(*p) for p in pairs]), floor)


def time_peer(M):
    """The same products by PyTorch."""
    x = randn(M, HIDDEN)
    for name, N in (("qkv and gate", 4 * H * D), ("out", HIDDEN), ("head", VOCAB)):
        held = [weight(N, HIDDEN, seed=n) for n in range(copies(2 * N * HIDDEN))]
        floor = 2 * N * HIDDEN / RATE
        note(f"cuBLAS {name} M={M}", graph_s([lambda w=w: F.linear(x, w) for w in held]), floor)


# ------------------------------------------------------------------ checks


def normed(x, by):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    root = (wide.square().mean(-1, keepdim=True) + by.eps).rsqrt()
    return (wide * root * by.weight.to(wide.dtype)).to(x.dtype)


def lightning_by_torch(x, o, by, w, dtype):
    u = normed(x.to(dtype), by)
    qkv = F.silu(u @ w.qkv.to(dtype).T).view(len(x), H, 3, D)
    gate = torch.sigmoid(u @ w.gate.to(dtype).T)
    wide = torch.promote_types(dtype, torch.float32)
    z = (normed(o.to(wide), w.norm) * gate).to(dtype) @ w.out.to(dtype).T
    return [*qkv.unbind(2), torch.add(POST.beta * z, u, alpha=POST.alpha)]


def check_lightning(M):
    x, o, by, w = randn(M, HIDDEN) * 4, randn(M, H * D, seed=1), norm(HIDDEN), lightning_weights(5)
    fed = ops.feed_lightning(x, by, w, POST)
    found = [*fed.tokens, ops.join_lightning(o, fed, w, POST)]
    eager, exact = (lightning_by_torch(x, o, by, w, d) for d in (LOW, torch.float64))
    for name, *three in zip("qkvy", found, eager, exact, strict=True):
        check_error(f"lightning M={M} {name}", *three)


def check_experts(M):
    x, by = randn(M, HIDDEN) * 4, norm(HIDDEN)
    layer = ops.DeviceExperts(
        weight(E, HIDDEN, seed=1).float(),
        weight(E, 2 * WIDTH, HIDDEN, seed=2),
        weight(E, HIDDEN, WIDTH, seed=3),
        CHOSEN,
    )
    choice = choose(x, by, layer.router, CHOSEN)
    u = normed(x, by)
    shares, experts = ops.route(ops.router_logits(choice.u, layer.router, impl="eager"), CHOSEN)
    exact = ops.route(choice.u.double() @ layer.router.double().T, CHOSEN, impl="eager")
    assert torch.equal(choice.experts.long(), experts), "experts"
    check_error(f"shares M={M}", choice.weights, shares, exact[0])
    plan = ops.plan_dispatch(experts, E, None)

    def by_torch(dtype):
        u = normed(x.to(dtype), by)
        args = (layer.gate_up.to(dtype), layer.down.to(dtype), plan)
        fed = ops.mixture(u, shares.to(dtype), *args, impl="eager")
        return torch.add(POST.beta * fed, u, alpha=POST.alpha)

    found = ops.experts_on_device(x, by, layer, POST)
    check_error(f"experts M={M}", found, by_torch(LOW), by_torch(torch.float64))
    check_error(f"u M={M}", choice.u, u, normed(x.double(), by))


def check_dense(M):
    x, by = randn(M, HIDDEN) * 4, norm(HIDDEN)
    gate_up, down = weight(2 * WIDTH, HIDDEN, seed=2), weight(HIDDEN, WIDTH, seed=3)

    def by_torch(dtype):
        u = normed(x.to(dtype), by)
        gate, up = (u @ gate_up.to(dtype).T).chunk(2, -1)
        f = (F.silu(gate) * up) @ down.to(dtype).T
        return torch.add(POST.beta * f, u, alpha=POST.alpha)

    found = ops.dense_on_device(x, by, gate_up, down, POST)
    check_error(f"dense M={M}", found, by_torch(LOW), by_torch(torch.float64))


def check_head(M):
    x, w = randn(M, HIDDEN), weight(VOCAB, HIDDEN, seed=1)
    eager = torch.mm(x, w.T, out_dtype=torch.float32)
    check_error(f"head M={M}", logits_on_device(x, w), eager, x.double() @ w.double().T)


# ------------------------------------------------------------------ whole steps of bench-2b


class Step:
    """A decoding step of M sequences after 512 tokens, on states and pages that are random."""

    def __init__(self, M):
        with torch.device(GPU):
            self.model = HybridModel(preset("bench-2b")).bfloat16().eval().requires_grad_(False)
        generator = torch.Generator(GPU).manual_seed(0)
        for name, p in self.model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, p.shape[-1] ** -0.5, generator=generator)
            if name.endswith("mlp.gate.weight"):
                self.model.get_parameter(name).data = p.data.float()
        self.M, self.ids = M, torch.arange(M, device=GPU)[:, None] + 5
        pages = torch.arange(M * 33, device=GPU).view(M, 33)
        at = torch.full((M,), 512, device=GPU)
        self.positions, zero = at[:, None].clone(), torch.zeros_like(at)
        self.table = PageTable(pages, pages[:, 32].clone(), zero, at + 1)
        self.pools = []
        for layer in self.model.config.layer_types:
            if layer == "linear_attention":
                self.pools.append(randn(M, H, D, D, dtype=torch.float32))
            else:
                self.pools.append([randn(M * 33, 16, 4, D, seed=n) for n in range(2)])
        self.slots, self.kept = torch.arange(M, device=GPU), randn(1, H, D, D, dtype=torch.float32)
        self.states = [p for p in self.pools if isinstance(p, torch.Tensor)]
        self.before = [p.clone() for p in self.states]

    def __call__(self):
        batch = Batch((1,) * self.M, (0,) * self.M, self.positions, None)
        snapshots = ops.Snapshots(self.kept, ())
        state = tuple(
            PagedKV(*pool, self.table)
            if isinstance(pool, list)
            else PooledState(pool, self.slots, snapshots)
            for pool in self.pools
        )
        hidden = self.model.hidden(self.ids, batch, state).hidden[:, 0]
        return self.model.logits(hidden)

    def fresh(self):
        """Logits after the states that there were first."""
        for p, q in zip(self.states, self.before, strict=True):
            p.copy_(q)
        return self().clone()


def time_step(M):
    with torch.inference_mode():
        step = Step(M)
        parts = [p for layer in step.model.layers for p in layer.parameters()]
        size = sum(p.numel() * p.element_size() for p in parts) + 2 * VOCAB * HIDDEN
        experts = sum(2 * p.numel() for n, p in step.model.named_parameters() if ".experts." in n)
        size -= experts * (1 - min(1.0, len_used(M) / E))
        size += 2 * sum(p.numel() * 4 for p in step.states)
        with mock.patch.object(overlap, "_can_overlap", return_value=False):
            apart = step.fresh()
            note(f"step by rows, apart M={M}", graph_s([step], 30), size / RATE)
        found = step.fresh()
        note(f"step by rows M={M}", graph_s([step], 30), size / RATE)
        check_overlapping(step, apart)
        with mock.patch.object(hybrid, "pays_by_rows", return_value=False):
            honest = step.fresh()
            note(f"step layer by layer M={M}", graph_s([step], 30), size / RATE)
        spread = float((found - honest).abs().max() / honest.abs().max())
        print(f"  largest difference of logits over the largest logit: {spread:.2e}", flush=True)


def check_overlapping(step, apart):
    """Launches that overlap give the bits of launches that do not, each time."""
    assert torch.equal(step.fresh(), apart), "launches that overlap give other logits"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step.fresh()
    for _ in range(50):
        graph.replay()
        assert torch.equal(found, apart), "a graph whose launches overlap gives other logits"


def len_used(M):
    """Experts of a layer that M tokens' random choices touch, on average."""
    return E * (1 - (1 - CHOSEN / E) ** M)


# ------------------------------------------------------------------ sweep

NAMES = ("BN", "BK", "WK", "num_warps", "num_stages", "BM")
# By a key's rows: NAMES; without BM a program has all of these rows.
TILES = {
    1: [
        (1, 2048, 1, 1, 1),
        (2, 1024, 1, 1, 1),
        (2, 2048, 1, 2, 1),
        (2, 2048, 1, 4, 1),
        (4, 1024, 1, 2, 1),
        (4, 1024, 1, 4, 1),
        (4, 2048, 1, 2, 1),
        (4, 2048, 1, 4, 1),
        (4, 2048, 1, 8, 1),
        (8, 512, 1, 4, 1),
        (8, 1024, 1, 4, 1),
        (8, 2048, 1, 4, 1),
        (8, 2048, 1, 8, 1),
        (16, 1024, 1, 8, 1),
        (16, 2048, 1, 8, 1),
        (16, 2048, 1, 16, 1),
        (32, 2048, 1, 16, 1),
    ],
    16: [
        (16, 64, 4, 4, 4),
        (16, 64, 4, 4, 5),
        (16, 128, 4, 4, 3),
        (16, 128, 4, 4, 4),
        (16, 64, 8, 8, 4),
        (16, 32, 8, 8, 5),
        (16, 128, 2, 2, 5),
        (16, 128, 2, 4, 5),
        (16, 256, 1, 4, 5),
        (32, 64, 4, 4, 3),
        (32, 64, 4, 4, 4),
        (32, 32, 4, 4, 5),
        (32, 64, 2, 4, 5),
        (32, 128, 2, 4, 4),
        (32, 32, 8, 8, 4),
        (32, 64, 8, 8, 3),
        (64, 64, 2, 4, 4),
        (64, 64, 4, 8, 3),
        (64, 128, 1, 4, 4),
        (64, 128, 1, 4, 5),
        (64, 64, 1, 4, 6),
        (128, 64, 1, 4, 5),
    ],
    32: [
        (16, 64, 4, 4, 4),
        (16, 128, 2, 4, 4),
        (16, 64, 2, 4, 5),
        (16, 64, 8, 8, 3),
        (32, 64, 2, 4, 4),
        (32, 64, 4, 4, 3),
        (32, 32, 8, 8, 4),
        (32, 64, 4, 8, 4),
        (64, 64, 1, 4, 5),
        (64, 128, 1, 4, 3),
        (64, 128, 1, 4, 4),
        (64, 128, 1, 4, 5),
        (64, 64, 2, 8, 4),
        (128, 64, 1, 4, 4),
        (128, 64, 1, 8, 4),
    ],
    64: [
        (16, 64, 4, 4, 3),
        (16, 64, 2, 4, 4),
        (16, 64, 4, 8, 4),
        (16, 128, 2, 4, 3),
        (32, 64, 2, 4, 4),
        (32, 64, 4, 8, 3),
        (32, 64, 4, 4, 3),
        (64, 64, 1, 4, 4),
        (64, 64, 1, 4, 6),
        (64, 128, 1, 4, 3),
        (64, 128, 1, 4, 4),
        (64, 64, 2, 8, 3),
        (128, 64, 1, 4, 4),
        (128, 64, 1, 8, 4),
        (128, 64, 1, 8, 5),
        (128, 128, 1, 8, 4),
        (16, 64, 4, 4, 4, 32),
        (32, 64, 4, 4, 4, 32),
        (64, 128, 1, 4, 4, 32),
    ],
    128: [
        (64, 64, 1, 4, 6),
        (64, 128, 1, 4, 3),
        (64, 128, 1, 4, 4),
        (64, 64, 1, 8, 5),
        (128, 64, 1, 8, 4),
        (128, 64, 1, 8, 6),
        (128, 128, 1, 8, 3),
        (256, 64, 1, 8, 4),
        (32, 64, 4, 8, 3, 64),
        (64, 64, 1, 4, 6, 64),
        (64, 128, 1, 4, 4, 64),
        (128, 64, 1, 8, 5, 64),
        (128, 128, 1, 8, 4, 64),
        (16, 64, 4, 4, 4, 32),
        (32, 64, 4, 4, 4, 32),
        (64, 64, 1, 4, 6, 32),
        (64, 128, 1, 4, 4, 32),
        (64, 128, 1, 4, 5, 32),
    ],
}
TABLES = {
    "project": ("few_rows_linear", "wide"),
    "join": ("few_rows_linear", "narrow"),
    "head": ("few_rows_linear", "vast"),
    "gate_up": ("few_rows_gate_up", ""),
    "down": ("few_rows_down", ""),
    "dense": ("few_rows_gate_up", ""),
}


def sweep_jobs():
    """(kernel of this script, table, key, rows, M)."""
    jobs = []
    for rows in TILES:
        for name in ("project", "join", "head"):
            table, width = TABLES[name]
            M = 8 if rows == 16 else rows
            jobs.append((name, table, f"16 bits {rows} rows {width}", rows, M))
        if rows == 1:
            continue
        # Tiles of experts hold twice their even share of M * 2 choices.
        M = {16: 8, 32: 64, 64: 128, 128: 128}[rows]
        for name in ("gate_up", "down") if rows < 128 else ("dense",):
            jobs.append((name, TABLES[name][0], f"16 bits {rows} rows", rows, M))
    jobs.append(("gate_up", "few_rows_gate_up", "16 bits alone", 1, 1))
    jobs.append(("down", "few_rows_down", "16 bits alone", 1, 1))
    return jobs


def candidates(rows):
    return [tiles.Tile(**({"BM": rows} | dict(zip(NAMES, c, strict=False)))) for c in TILES[rows]]


def config_of(tile, rows):
    """As a table has it: without the rows of its key."""
    config = {n: getattr(tile, n) for n in NAMES}
    if config["BM"] == rows:
        del config["BM"]
    return config


def compile_job(work):
    job, tile = work
    try:
        case = KERNELS[job[0]](job[4], num=1)
        case.run(0, tile)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job[2]} {tuple(tile)}: {str(error)[:60]}"
    return None


def sweep(out, only):
    jobs = [job for job in sweep_jobs() if not only or job[4] in only]
    work = [(job, tile) for job in jobs for tile in candidates(job[3])]
    print(f"{len(work)} configurations of {len(jobs)} keys", flush=True)
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        broken = [text for text in pool.imap_unordered(compile_job, work, chunksize=2) if text]
    print(f"compiled after {time.perf_counter() - BEGAN:.0f} s; broken: {broken}", flush=True)
    best, found = {}, []
    for job in jobs:
        if left() < 0:
            print("SKIPPED (time)", job, flush=True)
            continue
        case, timed = KERNELS[job[0]](job[4]), []
        for tile in candidates(job[3]):
            try:
                timed.append((graph_s(calls_of(case, tile)), tile))
            except Exception as error:
                print("  no", job[2], tuple(tile), str(error)[:80], flush=True)
        timed.sort(key=lambda pair: pair[0])
        configs = [(s, config_of(t, job[3])) for s, t in timed]
        found += [{"kernel": job[1], "key": job[2], "us": s * 1e6, "config": c} for s, c in configs]
        if configs:
            best.setdefault(job[1], {})[job[2]] = configs[0][1]
            tops = "  ".join(f"{s * 1e6:.2f}:{tuple(c.values())}" for s, c in configs[:4])
            print(f"{job[0]} {job[2]} floor {case.floor * 1e6:.2f}  {tops}", flush=True)
        case = None
        torch.cuda.empty_cache()
    Path(out).write_text(json.dumps({"best": best, "all": found}, indent=1))
    name = torch.cuda.get_device_name()
    print(json.dumps({kernel: {name: keys} for kernel, keys in best.items()}, indent=1))


STEP_JOBS = [
    ("project", "few_rows_linear", "16 bits 1 rows wide", 1, 1),
    ("join", "few_rows_linear", "16 bits 1 rows narrow", 1, 1),
    ("gate_up", "few_rows_gate_up", "16 bits alone", 1, 1),
    ("down", "few_rows_down", "16 bits alone", 1, 1),
    ("head", "few_rows_linear", "16 bits 1 rows vast", 1, 1),
]
STEPS_DEADLINE_S = 200
MOST_APART = 0.1  # of logits over the largest, by tiles that round differently


def steps(out):
    """One key after another, by the seconds of a whole step with the best of those before."""
    work = [(job, tile) for job in STEP_JOBS for tile in candidates(1)]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        broken = [text for text in pool.imap_unordered(compile_job, work, chunksize=2) if text]
    print(f"compiled after {time.perf_counter() - BEGAN:.0f} s; broken: {broken}", flush=True)
    chosen, found, usual = {}, [], tiles.best_config

    def config(kernel, key, name):
        return chosen.get((kernel, key)) or usual(kernel, key, name)

    with torch.inference_mode(), mock.patch.object(tiles, "best_config", config):
        step = Step(1)
        wanted = step.fresh()
        print(f"step with the usual tiles {graph_s([step], 30) * 1e6:.1f} us", flush=True)
        for job in STEP_JOBS:
            timed = []
            for tile in candidates(1):
                if time.perf_counter() - BEGAN > STEPS_DEADLINE_S:
                    print("SKIPPED (time)", job[2], tuple(tile), flush=True)
                    continue
                chosen[job[1:3]] = config_of(tile, job[3])
                try:
                    far = float((step.fresh() - wanted).abs().max() / wanted.abs().max())
                    if not far < MOST_APART:
                        print("  WRONG", job[2], tuple(tile), f"{far:.2e}", flush=True)
                        continue
                    timed.append((graph_s([step], 20) * 1e6, chosen[job[1:3]]))
                except Exception as error:
                    print("  no", job[2], tuple(tile), str(error)[:80], flush=True)
            timed.sort(key=lambda pair: pair[0])
            chosen.pop(job[1:3], None)
            if timed:
                chosen[job[1:3]] = timed[0][1]
            found += [{"kernel": job[1], "key": job[2], "us": us, "config": c} for us, c in timed]
            tops = "  ".join(f"{us:.1f}:{tuple(c.values())}" for us, c in timed[:5])
            print(f"{job[0]} {job[2]}  {tops}", flush=True)
    best = [{"kernel": k, "key": key, "config": c} for (k, key), c in chosen.items()]
    Path(out).write_text(json.dumps({"best": best, "all": found}, indent=1))
    print(json.dumps(best, indent=1))


def main(out, only):
    for M in only or CHECKED:
        for check in (check_lightning, check_experts, check_dense, check_head):
            attempt(f"{check.__name__} M={M}", check, M)
    print(
        f"checked after {time.perf_counter() - BEGAN:.0f} s: {failures or 'all well'}", flush=True
    )
    for M in only or ROWS:
        attempt(f"step M={M}", time_step, M)
        torch.cuda.empty_cache()
    for M in only or ROWS:
        for name in KERNELS:
            attempt(f"{name} M={M}", time_kernel, name, M)
        for run in (time_small, time_experts, time_peer):
            attempt(f"{run.__name__} M={M}", run, M)
        torch.cuda.empty_cache()
    device_name = torch.cuda.get_device_name()
    Path(out).write_text(
        json.dumps({"device": device_name, "rows": rows_out, "failures": failures}, indent=1)
    )
    print("\n".join(failures) or "no failures", f"{time.perf_counter() - BEGAN:.0f} s")


if __name__ == "__main__":
    out, *words = sys.argv[1:]
    numbers = [int(word) for word in words if word.isdigit()]
    if "steps" in words:
        steps(out)
    elif "sweep" in words:
        sweep(out, numbers)
    else:
        main(out, numbers)
