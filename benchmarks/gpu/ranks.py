"""Training steps of bench-2b on two GPUs against one, at the same work a GPU.

torchrun --nproc-per-node 2 benchmarks/gpu/ranks.py OUT.json           (timings, under 5 minutes)
torchrun --nproc-per-node 2 benchmarks/gpu/ranks.py OUT.json checks    (layouts against one GPU)
torchrun --nproc-per-node 2 benchmarks/gpu/ranks.py OUT.json longest   (1M tokens in one row)
torchrun --nproc-per-node 2 benchmarks/gpu/ranks.py OUT.json longest 1376256   (that many)

Checks and timings are runs of their own: NCCL keeps memory for each group that has been used. A
last word `tiny` runs any of them in minutes on a CPU, over gloo, to see that all of it works.
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

from sevenfold.models import ModelConfig, MoEConfig, preset
from sevenfold.models.training_memory import training_memory
from sevenfold.optim import AdamWConfig, build_adamw
from sevenfold.parallel import (
    Layout,
    ParallelConfig,
    Pipeline,
    clip_gradients,
    gradient_norm,
    groups_by_mesh,
)
from sevenfold.parallel.building import build_model, divided_on_meta
from sevenfold.parallel.gradients import local
from sevenfold.train.batch import read_step
from sevenfold.train.pipeline_step import forward_backward_by_stages
from sevenfold.train.step import forward_backward
from sevenfold.train.transform import narrow_stream, recompute_blocks

BUDGET_S = 255
BEGAN = time.monotonic()
TINY = "tiny" in sys.argv[2:]
KIND = "cpu" if TINY else "cuda"
AUTOCAST = None if TINY else "bf16"


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
        ids, labels = np.random.default_rng(index).integers(
            0, self.vocab_size, (2, sum(self.lengths))
        )
        return Row(ids, labels, self.lengths)


ONCE = {"gather_once": True}
BY_COPIES = {"expert_exchange": "copies", "weight_exchange": "copies"}
BY_ROWS = {
    "data: shard": {"shard": 2, **ONCE},
    "data: replicate": {"replicate": 2, **ONCE},
    "expert": {"shard": 2, "expert": 2, **ONCE},
    "data: shard, by copies": {"shard": 2, "weight_exchange": "copies", **ONCE},
    "expert, by copies": {"shard": 2, "expert": 2, **BY_COPIES, **ONCE},
    "expert, 2 token groups": {"shard": 2, "expert": 2, "expert_token_groups": 2, **ONCE},
}


if TINY:  # has no copy engine
    BY_ROWS = {name: degrees for name, degrees in BY_ROWS.items() if "by copies" not in name}


def work_by_rows(rows):
    """As many rows of 2,048 tokens on each of two GPUs as on one."""
    one = f"one {rows}x2048"
    return [
        (one, {}, (2048,), rows, 1, None),
        *((f"{n}, {rows}x2048 each", d, (2048,), 2 * rows, 1, one) for n, d in BY_ROWS.items()),
    ]


def work_by_length(tokens):
    """One document on one GPU and on two, and two of them on two."""
    one = f"one 1x{tokens}"
    ring, gather = ({"context": 2, "context_attention": way, **ONCE} for way in ("ring", "gather"))
    return [
        (one, {}, (tokens,), 1, 1, None),
        (f"context, ring, 1x{tokens}", ring, (tokens,), 1, 1, one),
        (f"context, gather, 1x{tokens}", gather, (tokens,), 1, 1, one),
        (f"context, ring, 2 documents of {tokens}", ring, (tokens, tokens), 1, 1, one),
    ]


# name, layout, documents of a row, rows of a micro-batch, micro-batches, baseline
WORK = [
    *work_by_rows(32),
    *work_by_length(65536),
    *work_by_rows(8),
    *work_by_length(16384),
    ("tensor", {"tensor": 2}, (2048,), 16, 1, "one 8x2048"),
    ("pipeline, 4 micro-batches", {"pipeline": 2}, (2048,), 4, 4, "one 8x2048"),
]


def fill(model):
    generator = torch.Generator(model.device).manual_seed(dist.get_rank())
    with torch.no_grad():
        for parameter in model.parameters():
            x = local(parameter)
            x.fill_(1.0) if parameter.dim() == 1 else x.normal_(std=0.02, generator=generator)


def step_once(model, optimizer, layout, pipeline, step, autocast):
    if pipeline is None:
        losses = forward_backward(model, step, autocast=autocast)
    else:
        losses = forward_backward_by_stages(model, pipeline, step, autocast=autocast)
    losses = layout.sum_over_shares(losses)
    norm = gradient_norm(model.named_parameters(), layout)
    clip_gradients(model.parameters(), 1.0, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses[0], norm


def leave(model):
    """A model as it is."""


def thrifty(model):
    """As `sevenfold train` holds long rows: blocks recomputed, the stream in bf16."""
    narrow_stream(model)
    recompute_blocks(model, 1)


def built(config, degrees, device, alone, whole, between=leave):
    parallel = ParallelConfig(**degrees)
    parallel.check_model(config)
    layout = Layout(parallel) if alone else Layout.join(parallel, KIND)
    if whole:
        model = build_model(config, layout, seed=3, device=device, between=between)
    else:
        model = divided_on_meta(config, layout, between=between)
        model.to_empty(device=device)
        fill(model)
    optimizer = build_adamw(model.train().named_parameters(), AdamWConfig(lr=1e-5))
    optimizer.param_groups[:] = groups_by_mesh(optimizer.param_groups)
    pipeline = None
    if parallel.pipeline > 1:
        stream = torch.bfloat16 if between is thrifty else model.dtype
        pipeline = Pipeline(model, layout, stream=stream)
    return model, optimizer, layout, pipeline


def synchronize():
    if not TINY:
        torch.cuda.synchronize()


def reset_peak():
    gc.collect()
    if not TINY:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib():
    """The higher of the two ranks'."""
    peak = torch.tensor(0 if TINY else torch.cuda.max_memory_allocated())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item() / 2**30


def seconds_of(steps, take):
    """Seconds of each step, which all ranks begin together and end when both are done."""
    times = []
    for _ in range(steps):
        synchronize()
        dist.barrier()
        began = time.perf_counter()
        values = take()
        synchronize()
        times.append(time.perf_counter() - began)
        # A rank that stops alone would leave the other waiting.
        if late():
            break
    return times, values


def timed(config, name, degrees, lengths, rows, micro_batches, device):
    alone = not degrees
    if TINY:
        lengths = tuple(n // 64 for n in lengths)
    # What the case before has left is in cycles.
    reset_peak()
    took = None
    if not alone or dist.get_rank() == 0:
        model, optimizer, layout, pipeline = built(config, degrees, device, alone, whole=False)
        step = read_step(
            Rows(lengths, config.vocab_size),
            0,
            rows * micro_batches,
            micro_batch_rows=rows,
            device=device,
            layout=layout,
        )

        def took():
            return step_once(model, optimizer, layout, pipeline, step, AUTOCAST)

    reset_peak()
    # The rank that has nothing to do counts steps, and waits.
    times, values = seconds_of(4 if TINY else 11, took or (lambda: (0.0, 0.0)))
    seconds = statistics.median(times[min(3, len(times) - 1) :])
    tokens = rows * micro_batches * sum(lengths)
    loss, norm = (float(x) for x in values)
    return {
        "name": name,
        "layout": degrees,
        "tokens": tokens,
        "step_s": seconds,
        # Each of them, and what memory was like: both tell a slow case from a disturbed one.
        "steps_s": times,
        "tokens_per_s": tokens / seconds,
        "loss": loss,
        "norm": norm,
        "peak_gib": peak_gib(),
        **memory(),
    }


def memory():
    """What this rank's allocator took, what was left, and how often it gave all back in need."""
    if TINY:
        return {}
    stats = torch.cuda.memory_stats()
    return {
        "reserved_gib": stats["reserved_bytes.all.peak"] / 2**30,
        "free_gib": torch.cuda.mem_get_info()[0] / 2**30,
        "alloc_retries": stats["num_alloc_retries"],
    }


# A short row compiles and connects; each of the others is one step.
LONG_ROWS = (2**17, 2**20)


def longest(device, result, out):
    """Steps of the 1B hybrid over one row, half of it on each GPU: 1M tokens unless asked."""
    rows = tuple(int(word) for word in sys.argv[2:] if word.isdecimal()) or LONG_ROWS
    if not TINY:
        # Without, a fifth of what the allocator holds lay idle between others when memory ran out.
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    config = preset("nano-hybrid" if TINY else "1b-hybrid")
    config = config.model_copy(update={"max_position_embeddings": max(rows)})
    degrees = {"context": 2, "context_attention": "ring"}
    model, optimizer, layout, pipeline = built(config, degrees, device, False, False, thrifty)
    for number, tokens in enumerate((LONG_ROWS[0], *rows)):
        if TINY:
            tokens //= 2**10
        loader = Rows((tokens,), config.vocab_size)
        step = read_step(loader, 0, 1, micro_batch_rows=1, device=device, layout=layout)

        def take(step=step):
            return step_once(model, optimizer, layout, pipeline, step, "bf16")

        reset_peak()
        (seconds,), values = seconds_of(1, take)
        predicted = training_memory(config, tokens // 2, recompute_every=1, context_ranks=2)
        loss, norm = (float(x) for x in values)
        row = {
            "name": f"longest: 1b-hybrid, context 2, blocks recomputed, 1 x {tokens:,}",
            "layout": degrees,
            "tokens": tokens,
            "step_s": seconds,
            "tokens_per_s": tokens / seconds,
            "loss": loss,
            "norm": norm,
            "peak_gib": peak_gib(),
            "predicted_gib": predicted.total / 2**30,
            "reserved_gib": 0 if TINY else torch.cuda.memory_reserved() / 2**30,
        }
        if dist.get_rank() == 0 and number:
            result["rows"].append(row)
            print(
                f"1 x {tokens:,}: {seconds:.1f} s, loss {loss:.3f}, peak {row['peak_gib']:.2f} GiB "
                f"(predicted {row['predicted_gib']:.2f}), {row['reserved_gib']:.1f} GiB reserved",
                flush=True,
            )
            out.write_text(json.dumps(result, indent=1))


CHECKS = [
    {},
    {"shard": 2},
    {"replicate": 2},
    {"shard": 2, "expert": 2},
    {"shard": 2, "expert": 2, **BY_COPIES},
    {"context": 2, "weight_exchange": "copies"},
    {"shard": 2, "gather_dtype": "bf16", **ONCE},
    {"shard": 2, "expert": 2, "gather_dtype": "bf16", **BY_COPIES, **ONCE},
    {"context": 2, "gather_dtype": "bf16", "weight_exchange": "copies", **ONCE},
    {"shard": 2, "expert": 2, "expert_token_groups": 2},
    {"context": 2, "context_attention": "gather"},
    {"context": 2, "context_attention": "ring"},
    {"context": 2, "expert": 2},
    {"tensor": 2},
    {"tensor": 2, "expert": 2, "expert_tensor": 1},
    {"pipeline": 2},
    {"pipeline": 2, "pipeline_stages": 2},
]


if TINY:
    CHECKS = [layout for layout in CHECKS if "copies" not in layout.values()]


def checks(device):
    """Loss and gradient norm of a small model, every layout against one GPU, in fp32 and bf16."""
    config = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        layer_types=("linear_attention", "full_attention") * 2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=256,
        rotary_dim=32,
        moe=MoEConfig(num_local_experts=4, router_aux_loss_coef=0.01),
    )
    found = []
    # Documents that borders cut anywhere; and one whose pieces are of a length that cuDNN takes.
    cases = [(a, *rows) for a in (None, "bf16") for rows in (((700, 1, 323), 4), ((4096,), 1))]
    for autocast, lengths, rows in cases:
        one = None
        for degrees in CHECKS:
            alone = not degrees
            if rows == 1 and degrees and "context" not in degrees:
                continue
            if autocast is None and "gather_dtype" in degrees:  # what it rounds, products round
                continue
            model, optimizer, layout, pipeline = built(config, degrees, device, alone, whole=True)
            step = read_step(
                Rows(lengths, 512), 0, 2 * rows, micro_batch_rows=rows, device=device, layout=layout
            )
            loss, norm = (
                float(x) for x in step_once(model, optimizer, layout, pipeline, step, autocast)
            )
            one = one or (loss, norm)
            found.append(
                {
                    "autocast": autocast,
                    "layout": degrees,
                    "documents": lengths,
                    "loss": loss,
                    "norm": norm,
                    "loss_error": abs(loss / one[0] - 1),
                    "norm_error": abs(norm / one[1] - 1),
                }
            )
            if dist.get_rank() == 0:
                print(
                    f"check {autocast or 'fp32'} {lengths} {degrees}: loss {loss:.6f} "
                    f"(rel. {found[-1]['loss_error']:.1e}), norm {norm:.5f} "
                    f"(rel. {found[-1]['norm_error']:.1e})",
                    flush=True,
                )
    return found


def late():
    flag = torch.tensor([int(time.monotonic() - BEGAN > BUDGET_S)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def main():
    device = torch.device("cpu")
    if not TINY:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # As the trainer does: with a device, NCCL would make every group of a layout at once.
    dist.init_process_group("gloo" if TINY else "cpu:gloo,cuda:nccl")
    result = {
        "device": "cpu" if TINY else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": [],
        "errors": [],
    }
    out = Path(sys.argv[1])
    if "longest" in sys.argv[2:]:
        longest(device, result, out)
    elif "checks" in sys.argv[2:]:
        result["checks"] = checks(device)
    else:
        timings(device, result, out)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(result, indent=1))
        print(f"{time.monotonic() - BEGAN:.0f} s; {result['errors'] or 'no errors'}", flush=True)
    dist.destroy_process_group()


def timings(device, result, out):
    config = preset("bench-19m" if TINY else "bench-2b")
    rates = {}
    for work in WORK:
        if late():
            result["errors"].append(f"no time left for {work[0]}")
            continue
        row = timed(config, *work[:5], device)
        if dist.get_rank() == 0:
            rates[work[0]] = row["tokens_per_s"]
            row["ratio"] = row["tokens_per_s"] / rates[work[5]] if work[5] in rates else None
            result["rows"].append(row)
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
            print(
                f"{row['name']:<46} {row['tokens_per_s']:>10,.0f} tok/s {row['step_s']:.3f} s "
                f"{ratio:>6} peak {row['peak_gib']:.1f} GiB loss {row['loss']:.3f}",
                flush=True,
            )
            out.write_text(json.dumps(result, indent=1))


main()
