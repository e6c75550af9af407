"""What bounds a training step of bench-2b: the host, the GPU, or what they exchange.

torchrun --nproc-per-node 2 benchmarks/gpu/host_time.py OUT.json

Per step and layout: wall time; the host's time until its last launch, by part, and what of it the
process computed; time that the garbage collector took; and from a profile of further steps the
GPU's busy time, NCCL's kernels, and those of them that no other kernel hid. A last word `tiny`
tries it on a CPU, over gloo, without a profile.
"""

import gc
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sevenfold.models import preset
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
TOKENS = 32 if TINY else 2048
ROWS = (8, 24)  # of a GPU
WARM_UP, TIMED, PROFILED = 4, 6, 2
LAYOUTS = {"one": {}, "data: shard": {"shard": 2}}
if "gather_once" in ParallelConfig.model_fields:
    LAYOUTS["data: shard, gathered once"] = {"shard": 2, "gather_once": True}


@dataclass
class Row:
    input_ids: np.ndarray
    labels: np.ndarray
    lengths: tuple
    num_bytes: int = 1


@dataclass
class Rows:
    vocab_size: int

    def sample(self, index):
        ids = np.random.default_rng(index).integers(0, self.vocab_size, (2, TOKENS))
        return Row(*ids, (TOKENS,))


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
    columns = zip(*found, strict=True)
    return {f"{n}_ms": 1e3 * statistics.median(c) for n, c in zip(names, columns, strict=False)}


def union(spans):
    """Nanoseconds that at least one of the spans covers."""
    total, until = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def profiled(take):
    """What the GPU did in a step: mean of a few, in ms."""
    synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        for _ in range(PROFILED):
            ends = take()
        synchronize()
    if not ends:
        return {}
    nccl, other, kernels = [], [], 0
    for event in watched.profiler.kineto_results.events():
        if event.device_type() is not DeviceType.CUDA or event.duration_ns() == 0:
            continue
        span = (event.start_ns(), event.start_ns() + event.duration_ns())
        name = event.name()
        # Beside kernels there are ranges that stand for calls of the host.
        if "Synchron" in name or name.startswith(("nccl:", "FSDP::", "c10d::")):
            continue
        (nccl if "nccl" in name.lower() else other).append(span)
        kernels += 1
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
    return {**mean, "gpu_kernels": kernels / PROFILED}


def measured(config, name, degrees, device, collections):
    takes_part = bool(degrees) or dist.get_rank() == 0
    if takes_part:
        model, optimizer, layout = built(config, degrees, device)
    for rows in ROWS:
        take = list
        if takes_part:
            total = rows * layout.config.num_ranks
            step = read_step(
                Rows(config.vocab_size),
                0,
                total,
                micro_batch_rows=total,
                device=device,
                layout=layout,
            )

            def take(step=step):
                return step_once(model, optimizer, layout, step)

        # A rank that has nothing to do meets the other at each barrier.
        found = timed(take, collections)
        if not TINY:
            found |= profiled(take)
        yield {"name": name, "rows_per_gpu": rows, **found}


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
    for name, degrees in LAYOUTS.items():
        for row in measured(config, name, degrees, device, collections):
            if dist.get_rank() != 0:
                continue
            result["rows"].append(row)
            numbers = (f"{k} {v:.1f}" for k, v in row.items() if isinstance(v, float))
            print(f"{name}, {row['rows_per_gpu']} rows a GPU: {', '.join(numbers)}", flush=True)
            Path(sys.argv[1]).write_text(json.dumps(result, indent=1))
        gc.collect()
        if not TINY:
            torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        print(f"{time.monotonic() - began:.0f} s", flush=True)
    dist.destroy_process_group()


main()
