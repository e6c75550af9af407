"""What bounds a training step of bench-2b on two GPUs: the host, a GPU, or what they exchange.

torchrun --nproc-per-node 2 benchmarks/gpu/host_time.py OUT.json [data] [experts] [even] [context]

At 32,768 tokens a GPU: weights and experts divided, and rows of one and of two documents divided by
ring and by gather, each beside one GPU at the same work; words choose, none is all. Random routers
prefer some experts, whose rank the other waits for; `even` measures experts where each token's are
drawn, as a trained model's load is even. Per step: wall
time, its spread, and memory; the host's time until its last launch, by part, and what of it the
process computed; time that the garbage collector took; and from a profile of further steps the
GPU's busy time, NCCL's kernels, those of them that no other kernel hid, and the kernels whose sums
differ most from one GPU's. What is measured is written at once. A last word `tiny` tries it on a
CPU, over gloo, with a profile of the host's operators.
"""

import gc
import json
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sevenfold.models import preset
from sevenfold.models.feed_forward import Router
from sevenfold.ops import route_and_count, router_logits
from sevenfold.optim import AdamWConfig, build_adamw
from sevenfold.parallel import (
    Layout,
    ParallelConfig,
    clip_gradients,
    gradient_norm,
    groups_by_mesh,
)
from sevenfold.parallel.building import divided_on_meta
from sevenfold.parallel.gradients import local
from sevenfold.train.batch import read_step
from sevenfold.train.step import forward_backward

TINY = "tiny" in sys.argv[2:]
KIND = "cpu" if TINY else "cuda"
WARM_UP, TIMED, PROFILED = 4, 6, 2
FAR = 100.0  # of logits: what is drawn is chosen
DEVICE = DeviceType.CPU if TINY else DeviceType.CUDA
MOST_KERNELS, NAME_CHARACTERS = 10, 110
ONCE = {"gather_once": True}
WEIGHTS_BY_COPIES = {"weight_exchange": "copies", **ONCE}
BY_COPIES = {"expert_exchange": "copies", **WEIGHTS_BY_COPIES}


@dataclass(frozen=True)
class Case:
    """rows of documents of these lengths, beside a share of the kernels' time of another case.

    is_even: each token's experts are drawn, and not what the router prefers.
    """

    name: str
    degrees: dict
    lengths: tuple
    rows: int
    beside: str | None = None
    share: float = 1.0
    is_even: bool = False


def context(way, weights=ONCE):
    return {"context": 2, "context_attention": way, **weights}


SHORT, LONG, LONGER = "one, 16 x 2,048", "one, 1 x 32,768", "one, 1 x 65,536"
SHORT_CASES = {
    "data": [
        Case("data: shard", {"shard": 2, **ONCE}, (2048,), 32, SHORT),
        Case("data: shard, by copies", {"shard": 2, **WEIGHTS_BY_COPIES}, (2048,), 32, SHORT),
        Case(
            "data: shard, bf16 by copies",
            {"shard": 2, "gather_dtype": "bf16", **WEIGHTS_BY_COPIES},
            (2048,),
            32,
            SHORT,
        ),
    ],
    "experts": [
        Case("experts", {"shard": 2, "expert": 2, **ONCE}, (2048,), 32, SHORT),
        Case(
            "experts by copies",
            {"shard": 2, "expert": 2, "expert_exchange": "copies", **ONCE},
            (2048,),
            32,
            SHORT,
        ),
        Case(
            "experts by copies, bf16",
            {"shard": 2, "expert": 2, "expert_exchange": "copies", "gather_dtype": "bf16", **ONCE},
            (2048,),
            32,
            SHORT,
        ),
        Case("experts, all by copies", {"shard": 2, "expert": 2, **BY_COPIES}, (2048,), 32, SHORT),
        Case(
            "experts, all by copies, bf16",
            {"shard": 2, "expert": 2, "gather_dtype": "bf16", **BY_COPIES},
            (2048,),
            32,
            SHORT,
        ),
        Case(
            "experts, 2 token groups",
            {"shard": 2, "expert": 2, "expert_token_groups": 2, **ONCE},
            (2048,),
            32,
            SHORT,
        ),
    ],
}
EVEN = "one, 16 x 2,048, even"
EVEN_CASES = [
    replace(case, name=f"{case.name}, even", beside=EVEN, is_even=True)
    for case in SHORT_CASES["experts"]
]
TWO = (32_768, 32_768)
LONG_CASES = [
    Case("context by ring, 2 documents", context("ring"), TWO, 1, LONG),
    Case(
        "context by ring, 2 documents, bf16",
        context("ring", {"gather_dtype": "bf16", **ONCE}),
        TWO,
        1,
        LONG,
    ),
    Case(
        "context by ring, 2 documents, weights by copies",
        context("ring", WEIGHTS_BY_COPIES),
        TWO,
        1,
        LONG,
    ),
    Case(
        "context by ring, 2 documents, bf16 by copies",
        context("ring", {"gather_dtype": "bf16", **WEIGHTS_BY_COPIES}),
        TWO,
        1,
        LONG,
    ),
    Case("context by gather, 2 documents", context("gather"), TWO, 1, LONG),
    Case("context by ring, 1 document", context("ring"), (65_536,), 1, LONGER, 0.5),
    Case(
        "context by ring, 1 document, weights by copies",
        context("ring", WEIGHTS_BY_COPIES),
        (65_536,),
        1,
        LONGER,
        0.5,
    ),
    Case("context by gather, 1 document", context("gather"), (65_536,), 1, LONGER, 0.5),
    Case(
        "context by ring, 1 document, bf16",
        context("ring", {"gather_dtype": "bf16", **ONCE}),
        (65_536,),
        1,
        LONGER,
        0.5,
    ),
    Case(
        "context by ring, 1 document, bf16 by copies",
        context("ring", {"gather_dtype": "bf16", **WEIGHTS_BY_COPIES}),
        (65_536,),
        1,
        LONGER,
        0.5,
    ),
]
NUM_TWO = sum(case.lengths == TWO for case in LONG_CASES)
# What one GPU holds for 65,536 tokens; a smaller one compares with half of them.
LONGER_BYTES = 115 * 2**30


def chosen_cases():
    """The cases of the words; without a GPU those that need no copy engine and no autocast."""
    needs = {"copies", "bf16"} if TINY else set()
    return [case for case in named_cases() if not needs & set(case.degrees.values())]


def named_cases():
    words = set(sys.argv[2:]) - {"tiny"} or {*SHORT_CASES, "even", "context"}
    cases = []
    if words & {*SHORT_CASES}:
        cases.append(Case(SHORT, {}, (2048,), 16))
    for word, some in SHORT_CASES.items():
        cases += some if word in words else []
    if "even" in words:
        cases += [Case(EVEN, {}, (2048,), 16, is_even=True), *EVEN_CASES]
    if "context" not in words:
        return cases
    cases.append(Case(LONG, {}, (32_768,), 1))
    if TINY or torch.cuda.get_device_properties(0).total_memory > LONGER_BYTES:
        return [
            *cases,
            *LONG_CASES[:NUM_TWO],
            Case(LONGER, {}, (65_536,), 1),
            *LONG_CASES[NUM_TWO:],
        ]
    longer = [replace(case, beside=LONG, share=1.0) for case in LONG_CASES[NUM_TWO:]]
    return [*cases, *LONG_CASES[:NUM_TWO], *longer]


@dataclass
class Row:
    input_ids: np.ndarray
    labels: np.ndarray
    lengths: tuple
    num_bytes: int = 1
    num_padding_tokens: int = 0


@dataclass
class Rows:
    lengths: tuple
    vocab_size: int

    def sample(self, index):
        size = (2, sum(self.lengths))
        ids = np.random.default_rng(index).integers(0, self.vocab_size, size)
        return Row(*ids, self.lengths)


class Collections:
    """Seconds that the garbage collector took."""

    def __init__(self):
        self.seconds, self.began = 0.0, 0.0
        gc.callbacks.append(self)

    def __call__(self, phase, info):
        if phase == "start":
            self.began = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self.began


def draw_experts(model):
    """Let each token's experts be drawn: as many by the same operators, weighed by the router."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for number, router in enumerate(routers):
        router.forward = partial(drawn, router, {}, number)


def drawn(router, kept, number, x):
    logits = router_logits(x, router.weight)
    if len(x) not in kept:
        generator = torch.Generator(x.device).manual_seed(1000 * dist.get_rank() + number)
        drawn = torch.rand(logits.shape, generator=generator, device=x.device)
        best = drawn.topk(router.num_chosen, -1).indices
        kept[len(x)] = torch.zeros_like(drawn).scatter_(-1, best, FAR)
    return route_and_count(logits + kept[len(x)], router.num_chosen)


def busier_share(model, take):
    """The share of all choices that go to the half of the experts with more, by layer; its mean."""
    counts, hooks = [], []
    for router in (module for module in model.modules() if isinstance(module, Router)):
        num = len(router.weight)

        def count(_, __, found, num=num):
            counts.append(found[1].flatten().bincount(minlength=num))

        hooks.append(router.register_forward_hook(count))
    take()
    for hook in hooks:
        hook.remove()
    total = torch.stack(counts).double()
    dist.all_reduce(total)
    first = total[:, : total.shape[1] // 2].sum(1) / total.sum(1)
    return float(torch.maximum(first, 1 - first).mean())


def built(config, degrees, device):
    parallel = ParallelConfig(**degrees)
    layout = Layout.join(parallel, KIND) if degrees else Layout(parallel)
    model = divided_on_meta(config, layout, between=lambda model: None)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            x = local(parameter)
            x.fill_(1.0) if parameter.dim() == 1 else x.normal_(std=0.02)
    optimizer = build_adamw(model.train().named_parameters(), AdamWConfig(lr=1e-5))
    optimizer.param_groups[:] = groups_by_mesh(optimizer.param_groups)
    return model, optimizer, layout


def step_once(model, optimizer, layout, step):
    """Run one step; the host's time after each of its parts."""
    ends = []
    losses = forward_backward(model, step, autocast=None if TINY else "bf16")
    ends.append(time.perf_counter())
    layout.sum_over_shares(losses)
    clip_gradients(model.parameters(), 1.0, gradient_norm(model.named_parameters(), layout))
    ends.append(time.perf_counter())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ends.append(time.perf_counter())
    return ends


def synchronize():
    if not TINY:
        torch.cuda.synchronize()


def timed(take, collections):
    """Medians over steps that all ranks begin together, in ms."""
    found = []
    for number in range(WARM_UP + TIMED):
        synchronize()
        dist.barrier()
        collections.seconds = 0.0
        began, computed = time.perf_counter(), time.process_time()
        ends = take()
        computed = time.process_time() - computed
        synchronize()
        wall = time.perf_counter() - began
        if number >= WARM_UP and ends:
            parts = np.diff([began, *ends])
            found.append((wall, ends[-1] - began, *parts, computed, collections.seconds))
    names = (
        "wall",
        "host",
        "host_forward_backward",
        "host_norm_and_clipping",
        "host_optimizer",
        "host_computing",
        "garbage_collection",
    )
    columns = list(zip(*found, strict=True))
    medians = zip(names, columns, strict=False)
    result = {f"{n}_ms": 1e3 * statistics.median(c) for n, c in medians}
    if columns:
        result |= {"wall_least_ms": 1e3 * min(columns[0]), "wall_most_ms": 1e3 * max(columns[0])}
    return result


def memory():
    """Of the fullest moment since the last reset, and how often memory was given back in need."""
    if TINY:
        return {}
    stats = torch.cuda.memory_stats()
    return {
        "peak_gib": stats["allocated_bytes.all.peak"] / 2**30,
        "reserved_gib": stats["reserved_bytes.all.peak"] / 2**30,
        "free_gib": torch.cuda.mem_get_info()[0] / 2**30,
        "alloc_retries": stats["num_alloc_retries"],
    }


def union(spans):
    """Nanoseconds that at least one of the spans covers."""
    total, until = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def profiled(take):
    """What the GPU did in a step, mean of a few, in ms; and the sum of each kernel."""
    synchronize()
    dist.barrier()
    activity = ProfilerActivity.CPU if TINY else ProfilerActivity.CUDA
    with profile(activities=[activity]) as watched:
        for _ in range(PROFILED):
            ends = take()
        synchronize()
    if not ends:
        return {}, {}
    nccl, other, sums = [], [], Counter()
    for event in watched.profiler.kineto_results.events():
        # Not the same object: each event makes its own.
        if event.device_type() != DEVICE or event.duration_ns() == 0:
            continue
        span = (event.start_ns(), event.start_ns() + event.duration_ns())
        name = event.name()
        # Beside kernels there are ranges that stand for calls of the host.
        if "Synchron" in name or name.startswith(("nccl:", "FSDP::", "c10d::")):
            continue
        (nccl if "nccl" in name.lower() else other).append(span)
        sums[name[:NAME_CHARACTERS]] += event.duration_ns() / PROFILED / 1e6
    busy, work = union(nccl + other), union(other)
    window = max(end for _, end in nccl + other) - min(start for start, _ in nccl + other)
    ns = {
        "gpu_busy_ms": busy,
        "gpu_work_ms": work,
        "gpu_idle_ms": window - busy,
        "nccl_ms": union(nccl),
        "nccl_exposed_ms": busy - work,
    }
    mean = {name: value / PROFILED / 1e6 for name, value in ns.items()}
    return {**mean, "gpu_kernels": len(nccl + other) / PROFILED}, dict(sums)


def most_different(sums, others, share):
    """Kernels by how much longer, or shorter, they take a step than a share of another case's."""
    more = {name: sums.get(name, 0.0) - share * others.get(name, 0.0) for name in {*sums, *others}}
    most = sorted(more, key=lambda name: -abs(more[name]))[:MOST_KERNELS]
    return [
        {
            "kernel": name,
            "more_ms": more[name],
            "ms": sums.get(name, 0.0),
            "beside_ms": share * others.get(name, 0.0),
        }
        for name in most
    ]


def measured(config, case, device, collections):
    """Numbers of a case and the sums of its kernels: the times, then those with the profile's.

    Empty on a rank that takes no part.
    """
    take, lengths = list, case.lengths
    if TINY:
        lengths = tuple(n // 256 for n in lengths)
    else:
        torch.cuda.reset_peak_memory_stats()
    if case.degrees or dist.get_rank() == 0:
        model, optimizer, layout = built(config, case.degrees, device)
        if case.is_even:
            draw_experts(model)
        data = Rows(lengths, config.vocab_size)
        step = read_step(
            data, 0, case.rows, micro_batch_rows=case.rows, device=device, layout=layout
        )

        def take():
            return step_once(model, optimizer, layout, step)

    # A rank that has nothing to do meets the other at each barrier.
    found = timed(take, collections) | memory()
    if "expert" in case.degrees:
        found["busier_half_of_experts"] = busier_share(model, take)
    yield found, {}
    shares, sums = profiled(take)
    yield found | shares, sums


def main():
    began = time.monotonic()
    device = torch.device("cpu")
    if not TINY:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if TINY else "cpu:gloo,cuda:nccl")
    result = {
        "device": "cpu" if TINY else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": [],
    }
    config, collections = preset("bench-19m" if TINY else "bench-2b"), Collections()
    kernels = {}
    for case in chosen_cases():
        for found, sums in measured(config, case, device, collections):
            kernels[case.name] = sums
            if dist.get_rank() == 0:
                rows = {row["name"]: row for row in result["rows"]}
                rows[case.name] = described(case, found, kernels)
                result["rows"] = list(rows.values())
                Path(sys.argv[1]).write_text(json.dumps(result, indent=1))
        if dist.get_rank() == 0:
            show(rows[case.name])
        gc.collect()
        if not TINY:
            torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        print(f"{time.monotonic() - began:.0f} s", flush=True)
    dist.destroy_process_group()


def described(case, found, kernels):
    tokens = case.rows * sum(case.lengths)
    row = {"name": case.name, "layout": case.degrees, "tokens": tokens, **found}
    if case.beside is None or not kernels[case.name]:
        return row
    different = most_different(kernels[case.name], kernels[case.beside], case.share)
    return row | {"beside": case.beside, "share": case.share, "kernels": different}


def show(row):
    numbers = (f"{k} {v:.1f}" for k, v in row.items() if isinstance(v, float))
    print(f"{row['name']}: {', '.join(numbers)}", flush=True)
    for kernel in row.get("kernels", ()):
        print(
            f"  {kernel['more_ms']:+8.2f} ms ({kernel['ms']:.2f} for {kernel['beside_ms']:.2f}) "
            f"{kernel['kernel']}",
            flush=True,
        )


main()
