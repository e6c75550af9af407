"""Where the time to a first token goes, on a GPU: prefill_parts.py OUT.json [TOKENS]

Serves prompts of bench-2b by the engine, 131,072 tokens unless TOKENS says otherwise, and both
turns of a chat of 32,768. Prints of each: seconds to the first token without a profiler; then, of
one more prompt under it, how long the GPU was busy, how long it stood still, the longest
standstills with what the host did meanwhile, how far ahead of the GPU the host was, and kernels by
their time. And what no trace of kernels shows: calls that took memory from the driver, which wait
for the GPU.
"""

import json
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sevenfold.bench.serving.sides import Serving, random_ids
from sevenfold.models import HybridModel, init_weights, preset

ANSWER_TOKENS, QUESTION_TOKENS, CHAT_TOKENS = 16, 64, 32_768
REPEATS, SHOWN_GAPS, SHOWN_KERNELS, SHOWN_CALLS = 7, 12, 24, 4
GPU = torch.device("cuda")
# A standstill shorter than this is the way from one kernel to the next.
GAP_US = 10.0
_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
_ON_HOST = {"cuda_runtime", "cuda_driver", "cpu_op", "user_annotation"}
_STAGES = {
    "scheduler": ("step",),
    "cache": ("open", "extend", "snapshots_due", "close", "placement"),
    "_worker": ("prepare", "restore", "run"),
}
_OWN_STAGES = ("submit", "step", "_row", "_choose", "_take", "_record", "_run_ahead")


def name_stages(engine):
    """Let a trace show the engine's own stages; they cost a microsecond each."""
    named = {engine: _OWN_STAGES}
    named |= {getattr(engine, part): names for part, names in _STAGES.items()}
    for owner, names in named.items():
        for name in names:
            run, label = getattr(owner, name), f"{type(owner).__name__}.{name}"

            def recorded(*args, run=run, label=label, **options):
                with record_function(label):
                    return run(*args, **options)

            setattr(owner, name, recorded)


def timed(serve):
    """Seconds of a call that ends when its token is on the host."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    serve()
    return time.perf_counter() - began


def trace_of(serve):
    """A profiled call's trace events, and its seconds."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        with record_function("whole"):
            seconds = timed(serve)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [e for e in events if e.get("ph") == "X" and "cat" in e], seconds


def parts_of(events):
    """Of a trace: busy and idle times in ms, gaps with what the host did in them, kernels."""
    whole = next(e for e in events if e["name"] == "whole" and e["cat"] == "user_annotation")
    began, ended = whole["ts"], whole["ts"] + whole["dur"]
    ours = [e for e in events if began <= e["ts"] <= ended]
    on_gpu = sorted((e for e in ours if e["cat"] in _ON_GPU), key=lambda e: e["ts"])
    on_host = [e for e in ours if e["cat"] in _ON_HOST and e is not whole]
    if not on_gpu:
        raise SystemExit("the trace has no kernel in it")
    busy, gaps = merged(on_gpu, began, ended)
    first, last = on_gpu[0]["ts"], max(e["ts"] + e["dur"] for e in on_gpu)
    shown = sorted(gaps, key=lambda gap: gap["begin"] - gap["end"])[:SHOWN_GAPS]
    return {
        "wall_ms": whole["dur"] / 1e3,
        "before_first_ms": (first - began) / 1e3,
        "after_last_ms": (ended - last) / 1e3,
        "span_ms": (last - first) / 1e3,
        "busy_ms": busy / 1e3,
        "idle_in_gaps_ms": sum(gap["end"] - gap["begin"] for gap in gaps) / 1e3,
        "num_gaps": len(gaps),
        "num_launches": len(on_gpu),
        "gaps": [described(gap, on_host, began) for gap in shown],
        "host_ahead_ms": leads(on_gpu, on_host),
        "waits_ms": waits(on_host),
        "kernels": by_name(on_gpu),
    }


def merged(on_gpu, began, ended):
    """Microseconds in which anything ran, and the standstills, the first and the last included."""
    busy, gaps, reached, before = 0.0, [], began, "(nothing yet)"
    for event in on_gpu:
        begin, end = event["ts"], event["ts"] + event["dur"]
        if begin - reached > GAP_US:
            gaps.append({"begin": reached, "end": begin, "before": before, "after": event["name"]})
        busy += max(0.0, end - max(begin, reached))
        if end > reached:
            reached, before = end, event["name"]
    if ended - reached > GAP_US:
        gaps.append({"begin": reached, "end": ended, "before": before, "after": "(the token)"})
    return busy, gaps


def described(gap, on_host, began):
    """A standstill: where, how long, between which kernels, and the host's calls by their share."""
    spent = defaultdict(Counter)
    for event in on_host:
        inside = min(gap["end"], event["ts"] + event["dur"]) - max(gap["begin"], event["ts"])
        if inside > 0:
            spent[event["cat"]][event["name"]] += inside / 1e3
    return {
        "at_ms": (gap["begin"] - began) / 1e3,
        "ms": (gap["end"] - gap["begin"]) / 1e3,
        "before": gap["before"],
        "after": gap["after"],
        "host_ms": {cat: dict(names.most_common(SHOWN_CALLS)) for cat, names in spent.items()},
    }


def leads(on_gpu, on_host):
    """How long before it began each kernel was launched: quartiles, ms. About 0: the GPU waits."""
    launched = {
        e["args"]["correlation"]: e["ts"] + e["dur"]
        for e in on_host
        if e["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    ahead = [
        (e["ts"] - launched[e["args"]["correlation"]]) / 1e3
        for e in on_gpu
        if e.get("args", {}).get("correlation") in launched
    ]
    return statistics.quantiles(ahead, n=4) if len(ahead) > 1 else ahead


def waits(on_host):
    """Calls of the driver that are no launches, by their time: ms and how often."""
    found = defaultdict(lambda: [0.0, 0])
    for event in on_host:
        if event["cat"] in ("cuda_runtime", "cuda_driver") and "Launch" not in event["name"]:
            found[event["name"]][0] += event["dur"] / 1e3
            found[event["name"]][1] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1][0])[:SHOWN_KERNELS])


def by_name(on_gpu):
    """[ms, launches] of kernels of a name, the longest first."""
    found = defaultdict(lambda: [0.0, 0])
    for event in on_gpu:
        found[event["name"][:90]][0] += event["dur"] / 1e3
        found[event["name"][:90]][1] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1][0])[:SHOWN_KERNELS])


def memory_calls():
    """How often the allocators went to the driver so far, and seconds of pinned allocations."""
    device, host = torch.cuda.memory_stats(), torch.cuda.host_memory_stats()
    names = ("num_alloc_retries", "num_device_alloc", "num_device_free", "num_sync_all_streams")
    found = {name: device.get(name) for name in names}
    return found | {name: n for name, n in host.items() if "num_host" in name or "time.tot" in name}


def measure(name, serve):
    """Rows of one case: without a profiler, then under it."""
    for _ in range(2):
        timed(serve)
    before = memory_calls()
    seconds = [timed(serve) for _ in range(REPEATS)]
    after = memory_calls()
    calls = {k: v - before[k] for k, v in after.items() if v is not None and before[k] is not None}
    events, profiled_s = trace_of(serve)
    row = {
        "case": name,
        "ms": statistics.median(seconds) * 1e3,
        "each_ms": [s * 1e3 for s in seconds],
        "profiled_ms": profiled_s * 1e3,
        "memory_calls": calls,
        **parts_of(events),
    }
    show(row)
    return row


def show(row):
    """Print a row for people."""
    print(
        f"\n{row['case']}: {row['ms']:.2f} ms to the first token, {row['profiled_ms']:.2f} traced"
    )
    print("  each", [round(ms, 2) for ms in row["each_ms"]])
    print("  from the driver in all", row["memory_calls"])
    for key in ("before_first_ms", "span_ms", "busy_ms", "idle_in_gaps_ms", "after_last_ms"):
        print(f"  {key:18} {row[key]:9.3f}")
    print(f"  {row['num_launches']} launches, {row['num_gaps']} gaps above {GAP_US:.0f} us; host")
    print("  ahead of the GPU, quartiles, ms", [round(ms, 2) for ms in row["host_ahead_ms"]])
    for gap in row["gaps"]:
        print(
            f"  gap of {gap['ms']:8.3f} ms at {gap['at_ms']:9.3f}: {gap['before'][:40]} ->", end=""
        )
        print(f" {gap['after'][:40]}")
        for cat, names in gap["host_ms"].items():
            print(f"      {cat:16}", {call: round(ms, 3) for call, ms in names.items()})
    print("  no launches, [ms, calls]:")
    for name, (ms, calls) in row["waits_ms"].items():
        print(f"    {ms:9.3f} {calls:6} {name}")
    print("  kernels, [ms, launches]:")
    for name, (ms, launches) in row["kernels"].items():
        print(f"    {ms:9.3f} {launches:6} {name}")


def main():
    """Build the model, serve, and write the rows."""
    out, *rest = sys.argv[1:]
    tokens = int(rest[0]) if rest else 131_072
    named = preset("bench-2b")
    # As `sevenfold bench prefill` has it, whose peer rotates whole heads.
    config = named.model_copy(update={"rotary_dim": named.head_dim})
    with GPU:
        model = init_weights(HybridModel(config), seed=0, drawn_on=GPU)
    model = model.to(GPU, torch.bfloat16).eval().requires_grad_(False)
    free, _ = torch.cuda.mem_get_info()
    serving = Serving(model, memory_bytes=int(0.3 * free))
    name_stages(serving.engine)
    print(torch.cuda.get_device_name(), torch.__version__)
    print("chunks of", serving.limits.lone_chunk_tokens, "tokens")
    whole = random_ids(config, tokens).tolist()

    def prefill():
        serving.submit(whole, 1)
        serving.run()

    first = random_ids(config, CHAT_TOKENS).tolist()

    def prefill_chat():
        serving.submit(first, 1)
        serving.run()

    asked = serving.submit(first, ANSWER_TOKENS, salt=b"chat", turn=CHAT_TOKENS)
    serving.run()
    question = random_ids(config, QUESTION_TOKENS).tolist()
    second = [*first, *asked.generated, *question]

    def second_turn():
        serving.submit(second, 1, salt=b"chat")
        serving.run()

    rows = [
        measure(f"{tokens:,} tokens", prefill),
        measure(f"first turn of {CHAT_TOKENS:,}", prefill_chat),
        measure(f"second turn of {CHAT_TOKENS:,}", second_turn),
    ]
    Path(out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
