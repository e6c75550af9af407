"""Check and time the kernels for fewer bits: python benchmarks/gpu/fewer_bits.py OUT.json [sweep]

Checks every kernel by the error rule at real widths, times each in CUDA graphs over memory that the
L2 cannot hold, and compares with its floor, bytes / 4.27e12. "sweep" tries launch configurations
instead and prints the best of each key in the form of ops/tuning/*.json.
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
from sevenfold.ops.lightning import triton_decode_fp16, triton_decode_replay, triton_verify
from sevenfold.ops.quantised import rule, triton_linear, triton_mixture, triton_widen
from sevenfold.ops.swiglu import swiglu
from sevenfold.ops.testing import check_error, error_bound

warnings.filterwarnings("ignore", ".*has no tuning.*")
RATE = 4.27e12
MATMUL = 6.9e14
BEGAN = time.perf_counter()
DEADLINE_S = 225
GPU = torch.device("cuda")
D = 128
QUANTISE = {"int8": ops.quantise_rows, "fp8": ops.quantise_rows_fp8}
rows_out, failures = [], []


def left():
    return DEADLINE_S - (time.perf_counter() - BEGAN)


def randn(*shape, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device=GPU).to(dtype)


def graph_s(calls, replays=8):
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
    return statistics.mean(times) if replays >= 32 else statistics.median(times)


def note(case, seconds, floor, **more):
    row = {
        "case": case,
        "us": seconds * 1e6,
        "floor_us": floor * 1e6,
        "ratio": seconds / floor,
    } | more
    rows_out.append(row)
    print(
        f"{case:46s} {row['us']:9.2f} us  floor {row['floor_us']:8.2f}  x{row['ratio']:.2f}",
        flush=True,
    )


def attempt(name, run, *args):
    if left() < 0:
        failures.append(f"SKIPPED (time) {name}")
        return
    try:
        run(*args)
    except Exception as error:
        failures.append(
            f"FAILED {name}: {str(error).splitlines()[0][:200] if str(error) else error!r}"
        )
        traceback.print_exc(limit=4)


def copies(bytes_each):
    return max(2, min(40, int(2.4e8 // bytes_each)))


def random_codes(kind, *shape):
    """Codes and scales of any size, made where they are."""
    scale = torch.rand(shape[:-1], device=GPU) * 1e-2 / shape[-1] ** 0.5 + 1e-4
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=GPU)
    return (
        (codes, scale)
        if kind == "int8"
        else (codes.view(torch.int8).float().to(torch.float8_e4m3fn), scale)
    )


# ------------------------------------------------------------------ linear

LINEAR = {"qkv": (6144, 2048), "out": (2048, 2048), "M qkv/8": (3072, 6144), "M out": (6144, 8192)}


def exact_linear(kind, x, codes, scale):
    wide = x.double()
    if kind == "fp8":
        rounded = ops.quantise_rows_fp8(x)
        wide = rounded.codes.double() * rounded.scale.double()[:, None]
    return wide @ (codes.double() * scale.double()[:, None]).T


def check_linear(kind, M, N, K):
    x, held = randn(M, K, seed=M), QUANTISE[kind](randn(N, K, seed=1, dtype=torch.float32))
    run = ops.int8_linear if kind == "int8" else ops.fp8_linear
    exact, eager = exact_linear(kind, x, *held), run(x, *held, impl="eager")
    check_error(f"{kind} linear {M}x{N}x{K}", run(x, *held), eager, exact)
    check_error(f"{kind} linear {M}x{N}x{K} triton", run(x, *held, impl="triton"), eager, exact)
    if kind == "fp8":
        check_error("scaled_mm", run(x, *held, impl="scaled_mm"), eager, exact)


def time_linear(kind, name, M):
    N, K = LINEAR[name]
    x, run = randn(M, K), ops.int8_linear if kind == "int8" else ops.fp8_linear
    if kind == "bf16":
        weights = [randn(N, K, seed=n) for n in range(copies(2 * N * K))]
        seconds = graph_s([lambda w=w: F.linear(x, w) for w in weights])
        note(f"bf16 linear {name} M={M}", seconds, (2 * N * K + 2 * M * (N + K)) / RATE)
        return
    weights = [random_codes(kind, N, K) for _ in range(copies(N * K))]
    seconds = graph_s([lambda w=w: run(x, *w, impl="triton") for w in weights])
    note(f"{kind} linear {name} M={M}", seconds, (N * K + 4 * N + 2 * M * (N + K)) / RATE)


def time_ways(name, M):
    """Tile, scratch and bf16 where the rule chooses: which is the fastest?"""
    N, K = LINEAR[name]
    x = randn(M, K)
    weights = [random_codes("int8", N, K) for _ in range(4)]
    plain = [randn(N, K, seed=n) for n in range(4)]
    low = [random_codes("fp8", N, K) for _ in range(4)]
    floor = max(2 * M * N * K / MATMUL, N * K / RATE)
    tile = rule.linear_tile(128, N, GPU)
    ways = {
        "tile": [lambda w=w: triton_linear.run(x, None, *w, tile) for w in weights],
        "scratch": [lambda w=w: F.linear(x, triton_widen.widened(*w, x.dtype)) for w in weights],
        "bf16": [lambda w=w: F.linear(x, w) for w in plain],
        "fp8 scaled_mm": [lambda w=w: ops.fp8_linear(x, *w, impl="scaled_mm") for w in low],
        "fp8 tile": [lambda w=w: ops.fp8_linear(x, *w, impl="triton") for w in low],
    }
    for way, calls in ways.items():
        note(f"{name} M={M} {way}", graph_s(calls), floor)


# ------------------------------------------------------------------ experts


class Experts:
    def __init__(self, kind, T, E, D, width, copies=1, real=True):
        self.kind, self.T, self.E, self.D, self.width = kind, T, E, D, width
        self.x, logits = randn(T, D), randn(T, E, seed=3, dtype=torch.float32)
        self.weights, chosen = ops.route(logits, 2)
        self.dispatch = ops.plan_dispatch(chosen, E, None)
        self.held = []
        for n in range(copies):
            if real:
                parts = [
                    randn(E, 2 * width, D, seed=5 + n) / D**0.5,
                    randn(E, D, width, seed=7 + n) / width**0.5,
                ]
                self.held.append(
                    parts if kind == "bf16" else [QUANTISE[kind](p.float()) for p in parts]
                )
            else:
                wrap = ops.Int8Rows if kind == "int8" else ops.Fp8Rows
                self.held.append(
                    [
                        wrap(*random_codes(kind, E, 2 * width, D)),
                        wrap(*random_codes(kind, E, D, width)),
                    ]
                )

    def run(self, n=0, impl=None):
        args = (self.x, self.weights, *self.held[n], self.dispatch)
        if self.kind == "bf16":
            return ops.mixture(*args)
        return (ops.int8_mixture if self.kind == "int8" else ops.fp8_mixture)(*args, impl=impl)

    def floor(self):
        used = int((self.dispatch.rows_per_expert > 0).sum())
        size = 2 if self.kind == "bf16" else 1
        return max(
            used * 3 * self.width * self.D * size / RATE,
            2 * 2 * self.T * 3 * self.width * self.D / MATMUL,
        )


def check_int8_experts(T, E, D, width):
    case = Experts("int8", T, E, D, width)
    plain = [c.double() * s.double()[..., None] for c, s in case.held[0]]
    exact = ops.mixture(case.x.double(), case.weights.double(), *plain, case.dispatch, impl="eager")
    check_error(f"int8 experts T={T}", case.run(), case.run(impl="eager"), exact)


def check_fp8_experts(T, E, D, width):
    case = Experts("fp8", T, E, D, width)
    plan = triton_mixture.Plan(
        case.dispatch.choice, case.dispatch.row, case.dispatch.rows_per_expert
    )
    first, second = rule.expert_tiles(len(plan.choice), E, GPU)
    tokens = triton_widen.rounded_to_fp8(case.x, case.x.dtype)
    hidden = triton_mixture.gate_up_rows(*tokens, *case.held[0][0], plan, first)
    again = triton_widen.rounded_to_fp8(hidden, hidden.dtype)
    out = triton_mixture.down_rows(*again, *case.held[0][1], plan, second)
    start = 0
    for e, count in enumerate(case.dispatch.rows_per_expert.tolist()):
        span = slice(start, start := start + count)
        if not count:
            continue
        for name, found, x, held, then in (
            ("gate_up", hidden, case.x[case.dispatch.token], case.held[0][0], swiglu),
            ("down", out, hidden, case.held[0][1], lambda y: y),
        ):
            one = (held.codes[e], held.scale[e])
            eager = then(ops.fp8_linear(x[span], *one, impl="eager"))
            check_error(
                f"fp8 {name} T={T}", found[span], eager, then(exact_linear("fp8", x[span], *one))
            )


def time_experts(kind, T, E, D, width, name):
    num = copies(2 * 3 * width * D * (2 if kind == "bf16" else 1)) if T == 1 else 2
    num = min(num, max(1, int(1.2e10 // (E * 3 * width * D * (2 if kind == "bf16" else 1)))))
    case = Experts(kind, T, E, D, width, copies=num, real=kind == "bf16")
    if kind == "int8" and T >= 1024:
        tiles = rule.expert_tiles(len(case.dispatch.choice), E, GPU)
        with mock.patch.object(triton_mixture, "_takes_scratch", return_value=False):
            note(
                f"int8 experts {name} T={T} tile",
                graph_s([lambda n=n: case.run(n) for n in range(num)]),
                case.floor(),
                tile=str(tiles[0]),
            )
        with mock.patch.object(triton_mixture, "_takes_scratch", return_value=True):
            note(
                f"int8 experts {name} T={T} scratch",
                graph_s([lambda n=n: case.run(n) for n in range(num)]),
                case.floor(),
            )
        return
    note(
        f"{kind} experts {name} T={T}",
        graph_s([lambda n=n: case.run(n) for n in range(num)]),
        case.floor(),
    )


# ------------------------------------------------------------------ states


def tokens(lead, H, seed):
    return [randn(*lead, H, D, seed=seed + n) for n in range(3)]


def new_int8_pool(S, H, R=16):
    codes, scale = random_codes("int8", S, H, D, D)
    rings = [randn(S, H, R, D, seed=n) for n in range(2)]
    count = (
        (torch.arange(S, device=GPU, dtype=torch.int32) % (R + 1))[:, None]
        .expand(S, H)
        .contiguous()
    )
    return ops.Int8ReplayPool(codes, scale, *rings, count)


def new_fp16_pool(S, H):
    return ops.ScaledFp16(randn(S, H, D, D, dtype=torch.float16), torch.ones(S, H, device=GPU))


def noise(B, step=0):
    return ops.Noise(torch.arange(B, device=GPU), torch.full((B,), step, device=GPU), 3)


def check_fp16(H, layer):
    decay, pool, slots = (
        ops.layer_log_decay(64, layer, 80)[:H].to(GPU),
        new_fp16_pool(5, H),
        torch.tensor([3, -1, 0], device=GPU),
    )
    for step in range(4):
        q, k, v = tokens((3,), H, 3 * step)
        before = ops.from_scaled_fp16(*pool)[[3, 0]].double()
        other = ops.ScaledFp16(*(x.clone() for x in pool))
        eager = ops.lightning_attention_decode_fp16(
            q, k, v, decay, other, slots, noise(3, step), impl="eager"
        )
        found = ops.lightning_attention_decode_fp16(
            q, k, v, decay, pool, slots, noise(3, step), impl="triton"
        )
        exact = (
            decay.double().exp()[:, None, None] * before
            + k[::2, :, :, None].double() * v[::2, :, None].double()
        )
        check_error(
            "decode_fp16 o",
            found[::2],
            eager[::2],
            torch.einsum("bhk,bhkv->bhv", q[::2].double(), exact),
        )
        after = ops.from_scaled_fp16(*pool)[[3, 0]].double()
        bound = 2**-10 * (1 + 2**-9) * exact.abs() + 2**-22 * exact.abs().amax(
            (-2, -1), keepdim=True
        )
        assert bool(((after - exact).abs() <= bound).all()), "decode_fp16 states"
        same = (pool.codes[[3, 0]] == other.codes[[3, 0]]).double().mean()
        assert same > 0.99, f"decode_fp16 codes alike: {same}"


def check_int8(H, layer, T):
    decay, pool = ops.layer_log_decay(64, layer, 80)[:H].to(GPU), new_int8_pool(5, H)
    slots = torch.tensor([3, -1, 0, 4], device=GPU)
    for step in range(20):
        other = ops.Int8ReplayPool(
            *(getattr(pool, n).clone() for n in ("codes", "scale", "ring_k", "ring_v", "count"))
        )
        state = ops.dequantise_rows(pool.codes, pool.scale)
        wide = ops.ReplayPool(
            state.double(), pool.ring_k.double(), pool.ring_v.double(), pool.count.clone()
        )
        if T == 1:
            x = tokens((4,), H, 3 * step)
            run, plain, options = (
                ops.lightning_attention_replay_int8,
                ops.lightning_attention_replay,
                {},
            )
        else:
            x = tokens((4, T), H, 3 * step)
            run, plain = ops.lightning_attention_verify_int8, ops.lightning_attention_verify
            options = {
                "accepted": torch.tensor([[0, 1, -1]] * 4, dtype=torch.int32, device=GPU)
                if step
                else None
            }
        found = run(*x, decay, pool, slots, impl="triton", **options)
        eager = run(*x, decay, other, slots, impl="eager", **options)
        exact = plain(*(y.double() for y in x), decay, wide, slots, impl="eager", **options)
        check_error(f"int8 ring T={T} o", found, eager, exact)
        assert torch.equal(pool.count, other.count)
        got = ops.dequantise_rows(pool.codes, pool.scale).double()
        honest = ops.dequantise_rows(other.codes, other.scale).double()
        half = torch.maximum(pool.scale, other.scale).double()[..., None] / 2 * (1 + 2**-16)
        assert bool(
            ((got - wide.state).abs() <= half + error_bound(wide.state, wide.state.float())).all()
        ), "int8 states"
        assert bool(
            (
                (honest - wide.state).abs() <= half + error_bound(wide.state, wide.state.float())
            ).all()
        )


def check_snapshots(H):
    states, index = randn(6, H, D, D, dtype=torch.float32) * 30, torch.tensor([4, 1], device=GPU)
    shapes = {"fp16": (6, H), "int8": (6, H, D)}
    for kind, dtype in (("fp16", torch.float16), ("int8", torch.int8)):
        for bits in (None, noise(2, 9)) if kind == "fp16" else (None,):
            held = [
                ops.EncodedHeads(
                    torch.zeros(6, H, D, D, dtype=dtype, device=GPU),
                    torch.zeros(shapes[kind], device=GPU),
                )
                for _ in range(2)
            ]
            for impl, one in zip(("triton", "eager"), held, strict=True):
                ops.encode_states(states, index, one, index, noise=bits, impl=impl)
            assert torch.equal(held[0].codes, held[1].codes), f"{kind} codes"
            assert torch.equal(held[0].scale, held[1].scale), f"{kind} scales"
            back = [torch.zeros_like(states) for _ in range(2)]
            for impl, one in zip(("triton", "eager"), back, strict=True):
                ops.decode_states(held[0], index, one, index, impl=impl)
            assert torch.equal(*back)


def slot_sets(B, bytes_each, most=48):
    num = max(2, min(most, int(2.4e8 // (B * bytes_each))))
    return num * B, [torch.arange(n * B, (n + 1) * B, device=GPU) for n in range(num)]


def time_decode(kind, H, B):
    decay, q = ops.layer_log_decay(64, 40, 80)[:H].to(GPU), tokens((B,), H, 0)
    small = 2 * B * H * 4 * D
    if kind == "fp32":
        S, sets = slot_sets(B, 4 * H * D * D)
        pool = randn(S, H, D, D, dtype=torch.float32)
        calls = [lambda s=s: ops.lightning_attention_decode(*q, decay, pool, s) for s in sets]
        size, replays = 2 * 4 * B * H * D * D, 8
    elif kind == "fp16":
        S, sets = slot_sets(B, 2 * H * D * D)
        pool, bits = new_fp16_pool(S, H), noise(B)
        calls = [
            lambda s=s: ops.lightning_attention_decode_fp16(*q, decay, pool, s, bits) for s in sets
        ]
        size, replays = 2 * 2 * B * H * D * D, 8
    else:
        S, sets = slot_sets(B, H * D * D)
        pool = new_int8_pool(S, H)
        calls = [lambda s=s: ops.lightning_attention_replay_int8(*q, decay, pool, s) for s in sets]
        # Codes and scales read; on average half a ring; a fold writes them once in 16.
        size, replays = B * H * ((D * D + 4 * D) * 17 / 16 + 8 * 2 * D * 2 + 2 * 2 * D), 32
    note(f"decode {kind} H={H} B={B}", graph_s(calls, replays), (size + small) / RATE)


def time_verify(H, B, T=4):
    decay, x = ops.layer_log_decay(64, 40, 80)[:H].to(GPU), tokens((B, T), H, 0)
    S, sets = slot_sets(B, H * D * D)
    pool = new_int8_pool(S, H)
    accepted = torch.tensor([[0, 1, 2, -1]] * B, dtype=torch.int32, device=GPU)
    calls = [
        lambda s=s: ops.lightning_attention_verify_int8(*x, decay, pool, s, accepted=accepted)
        for s in sets
    ]
    size = B * H * ((D * D + 4 * D) * (1 + 1 / 4) + 8 * 2 * D * 2 + T * 8 * 2 * D)
    note(f"verify int8 T={T} H={H} B={B}", graph_s(calls, 32), size / RATE)


def time_snapshots(H, N):
    S, sets = slot_sets(N, 4 * H * D * D)
    states = randn(S, H, D, D, dtype=torch.float32)
    for kind, dtype, shape, size in (
        ("fp16", torch.float16, (S, H), 2),
        ("int8", torch.int8, (S, H, D), 1),
    ):
        held = ops.EncodedHeads(
            torch.zeros(S, H, D, D, dtype=dtype, device=GPU), torch.zeros(shape, device=GPU)
        )
        floor = N * H * D * D * (4 + size) / RATE
        note(
            f"encode {kind} H={H} N={N}",
            graph_s([lambda s=s, held=held: ops.encode_states(states, s, held, s) for s in sets]),
            floor,
        )
        note(
            f"decode states {kind} H={H} N={N}",
            graph_s([lambda s=s, held=held: ops.decode_states(held, s, states, s) for s in sets]),
            floor,
        )


# ------------------------------------------------------------------ the run


def main(out):
    print(torch.cuda.get_device_name(), torch.__version__)
    for kind in ("int8", "fp8"):
        for M, N, K in (
            (1, 6144, 2048),
            (16, 2048, 2048),
            (33, 3072, 2048),
            (64, 6144, 2048),
            (200, 2048, 1792),
            (700, 1024, 2048),
        ):
            attempt(f"check {kind} linear {M}", check_linear, kind, M, N, K)
    for T in (1, 16, 64, 600, 4096):
        attempt(f"check int8 experts {T}", check_int8_experts, T, 8, 2048, 1792)
    for T in (1, 64, 600):
        attempt(f"check fp8 experts {T}", check_fp8_experts, T, 8, 2048, 1792)
    for layer in (0, 78):
        attempt(f"check fp16 states layer {layer}", check_fp16, 64, layer)
        attempt(f"check int8 ring layer {layer}", check_int8, 64, layer, 1)
        attempt(f"check int8 drafts layer {layer}", check_int8, 64, layer, 4)
    attempt("check snapshots", check_snapshots, 16)
    print(
        f"--- checks done after {time.perf_counter() - BEGAN:.0f} s; {len(failures)} failed",
        flush=True,
    )
    for H in (16, 64):
        for B in (1, 16, 64):
            for kind in ("fp32", "fp16", "int8"):
                attempt(f"time decode {kind} {H} {B}", time_decode, kind, H, B)
            attempt(f"time verify {H} {B}", time_verify, H, B)
        attempt(f"time snapshots {H}", time_snapshots, H, 4)
    for M in (1, 16, 64):
        for name in ("qkv", "out"):
            for kind in ("bf16", "int8", "fp8"):
                attempt(f"time {kind} {name} {M}", time_linear, kind, name, M)
        for kind in ("bf16", "int8", "fp8"):
            attempt(f"time {kind} experts {M}", time_experts, kind, M, 8, 2048, 1792, "2b")
    for M in (256, 512, 1024, 4096):
        attempt(f"time ways {M}", time_ways, "qkv", M)
    for T in (1024, 2048, 4096):
        for kind in ("bf16", "int8"):
            attempt(f"time {kind} experts {T}", time_experts, kind, T, 8, 2048, 1792, "2b")
    for M in (1, 16, 64):
        for name in ("M qkv/8", "M out"):
            for kind in ("bf16", "int8"):
                attempt(f"time {kind} {name} {M}", time_linear, kind, name, M)
    for T in (1, 16):
        attempt(
            f"time int8 MiniMax experts {T}", time_experts, "int8", T, 32, 6144, 9216, "MiniMax"
        )
    report(out)


def report(out):
    took = time.perf_counter() - BEGAN
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "took_s": took,
        "rows": rows_out,
        "failures": failures,
    }
    Path(out).write_text(json.dumps(record, indent=1))
    print("\n" + "=" * 78)
    for row in rows_out:
        print(f"{row['case']:46s} {row['us']:9.2f} us  {row['floor_us']:8.2f}  x{row['ratio']:.2f}")
    print(f"{took:.0f} s; {len(failures)} failed or skipped")
    print("\n".join(failures))


# ------------------------------------------------------------------ the sweep

# (BN, BK, WK, num_warps, num_stages) by rows of a tile.
TILES = {
    16: [
        (16, 128, 4, 4, 4),
        (16, 64, 8, 8, 4),
        (16, 256, 4, 4, 3),
        (16, 128, 8, 8, 3),
        (32, 128, 4, 4, 4),
        (32, 128, 2, 4, 4),
        (32, 64, 8, 8, 4),
        (64, 128, 2, 8, 4),
        (64, 128, 1, 4, 5),
    ],
    32: [
        (16, 64, 4, 4, 4),
        (32, 64, 4, 4, 4),
        (32, 128, 4, 4, 3),
        (32, 64, 8, 8, 3),
        (64, 64, 2, 8, 4),
        (64, 128, 1, 4, 5),
    ],
    64: [
        (32, 64, 4, 4, 3),
        (32, 64, 8, 8, 3),
        (64, 64, 2, 8, 3),
        (64, 128, 1, 4, 4),
        (64, 64, 1, 4, 5),
        (128, 64, 1, 4, 5),
        (128, 128, 1, 8, 4),
    ],
    128: [
        (64, 64, 1, 4, 4),
        (64, 128, 1, 4, 3),
        (128, 64, 1, 8, 4),
        (128, 64, 1, 4, 4),
        (128, 128, 1, 8, 3),
        (256, 64, 1, 8, 3),
    ],
}
NAMES = ("BN", "BK", "WK", "num_warps", "num_stages")
DECODE = {
    "lightning_decode_fp16": (
        triton_decode_fp16,
        [
            {"ROWS": r, "num_warps": w}
            for r, w in ((16, 4), (32, 4), (64, 8), (128, 8), (32, 8), (64, 4))
        ],
    ),
    "lightning_replay_int8": (
        triton_decode_replay,
        [
            {"BV": b, "BF": f, "num_warps": w}
            for b, f, w in (
                (128, 32, 4),
                (64, 32, 4),
                (32, 32, 4),
                (64, 16, 2),
                (128, 64, 8),
                (128, 32, 8),
            )
        ],
    ),
    "lightning_verify_int8": (
        triton_verify,
        [
            {"BV": b, "BF": f, "num_warps": w, "num_stages": s}
            for b, f, w, s in (
                (64, 32, 4, 3),
                (64, 32, 4, 2),
                (32, 16, 2, 3),
                (32, 16, 4, 2),
                (128, 32, 4, 1),
                (64, 16, 2, 2),
            )
        ],
    ),
}


def sweep_jobs():
    jobs = []
    for rows in TILES:
        M = {16: 1, 32: 32, 64: 64, 128: 256}[rows]
        for width, name in (("narrow", "out"), ("wide", "qkv")):
            jobs.append(("quantised_linear", f"{rows} rows {width}", M, name))
        T = {16: 1, 32: 64, 64: 128, 128: 1024}[rows]
        jobs += [
            ("quantised_gate_up", f"{rows} rows", T, ""),
            ("quantised_down", f"{rows} rows", T, ""),
        ]
    for kernel in DECODE:
        jobs += [(kernel, "K128 few heads", 1, ""), (kernel, "K128 many heads", 64, "")]
    return jobs


def candidates(kernel, key):
    if kernel in DECODE:
        return DECODE[kernel][1]
    return [dict(zip(NAMES, c, strict=True)) for c in TILES[int(key.split()[0])]]


class Job:
    def __init__(self, kernel, key, size, name, num=None):
        self.kernel, self.key = kernel, key
        if kernel == "quantised_linear":
            N, K = LINEAR[name]
            self.BM, self.x = int(key.split()[0]), randn(size, K)
            self.held = [random_codes("int8", N, K) for _ in range(num or copies(N * K))]
        elif kernel in DECODE:
            H = 16 if size == 1 else 64
            self.decay = ops.layer_log_decay(64, 40, 80)[:H].to(GPU)
            fp16 = kernel.endswith("fp16")
            S, self.sets = slot_sets(size, (2 if fp16 else 1) * H * D * D, num or 48)
            self.pool, self.bits = new_fp16_pool(S, H) if fp16 else new_int8_pool(S, H), noise(size)
            self.x = tokens((size, 4) if "verify" in kernel else (size,), H, 0)
            self.accepted = torch.tensor([[0, 1, 2, -1]] * size, dtype=torch.int32, device=GPU)
        else:
            self.BM, first = int(key.split()[0]), kernel == "quantised_gate_up"
            case = Experts("int8", size, 8, 2048, 1792, copies=0)
            d = case.dispatch
            self.plan = triton_mixture.Plan(d.choice, d.row, d.rows_per_expert)
            self.x = case.x if first else randn(len(d.choice), 1792)
            shape = (8, 3584, 2048) if first else (8, 2048, 1792)
            each = int((d.rows_per_expert > 0).sum()) * shape[1] * shape[2]
            self.held = [random_codes("int8", *shape) for _ in range(num or min(16, copies(each)))]

    def calls(self, config):
        if self.kernel in DECODE:
            return [lambda s=s: self.decode(s) for s in self.sets]
        tile = rule.Tile(BM=self.BM, **config)
        if self.kernel == "quantised_linear":
            return [lambda h=h: triton_linear.run(self.x, None, *h, tile) for h in self.held]
        run = (
            triton_mixture.gate_up_rows
            if self.kernel == "quantised_gate_up"
            else triton_mixture.down_rows
        )
        return [lambda h=h: run(self.x, None, *h, self.plan, tile) for h in self.held]

    def decode(self, slots):
        if self.kernel == "lightning_decode_fp16":
            return ops.lightning_attention_decode_fp16(
                *self.x, self.decay, self.pool, slots, self.bits
            )
        if self.kernel == "lightning_replay_int8":
            return ops.lightning_attention_replay_int8(*self.x, self.decay, self.pool, slots)
        return ops.lightning_attention_verify_int8(
            *self.x, self.decay, self.pool, slots, accepted=self.accepted
        )

    def patched(self, config):
        module = DECODE[self.kernel][0] if self.kernel in DECODE else rule
        name = "tuning" if self.kernel in DECODE else "best_config"
        return mock.patch.object(module, name, side_effect=lambda *_: dict(config))


def compile_job(work):
    """In another process: one configuration into Triton's cache on disk."""
    job, config = work
    try:
        made = Job(*job, num=2)
        with made.patched(config):
            made.calls(config)[0]()
        torch.cuda.synchronize()
        return None
    except Exception as error:
        return f"{job[:2]} {config}: {str(error)[:120]}"


def sweep(out):
    jobs = sweep_jobs()
    work = [(job, config) for job in jobs for config in candidates(*job[:2])]
    print(f"{len(work)} configurations of {len(jobs)} keys", flush=True)
    with multiprocessing.get_context("spawn").Pool(12) as pool:
        broken = [text for text in pool.imap_unordered(compile_job, work, chunksize=1) if text]
    print(f"compiled after {time.perf_counter() - BEGAN:.0f} s; broken: {broken}", flush=True)
    best, found = {}, []
    for job in jobs:
        made = Job(*job)
        timed = []
        for config in candidates(*job[:2]):
            try:
                with made.patched(config):
                    timed.append(
                        (graph_s(made.calls(config), 32 if "int8" in job[0] else 8), config)
                    )
            except Exception as error:
                print("  no", job[:2], config, str(error)[:80], flush=True)
        timed.sort(key=lambda pair: pair[0])
        found += [{"kernel": job[0], "key": job[1], "us": s * 1e6, "config": c} for s, c in timed]
        if timed:
            best.setdefault(job[0], {})[job[1]] = timed[0][1]
            print(
                job[0],
                job[1],
                "  ".join(f"{s * 1e6:.2f}:{tuple(c.values())}" for s, c in timed[:4]),
                flush=True,
            )
        del made
        torch.cuda.empty_cache()
    Path(out).write_text(json.dumps({"best": best, "all": found}, indent=1))
    print(
        json.dumps(
            {kernel: {torch.cuda.get_device_name(): keys} for kernel, keys in best.items()},
            indent=1,
        )
    )
    print(f"{time.perf_counter() - BEGAN:.0f} s")


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else "/tmp/quant.json"
    with torch.inference_mode():
        sweep(target) if "sweep" in sys.argv[2:] else main(target)
