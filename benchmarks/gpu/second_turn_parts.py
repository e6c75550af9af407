"""Where the time of a chat's second turn goes: second_turn_parts.py OUT.json [tiny]

bench-2b in bf16 behind 32,768 tokens, 16 of an answer and 64 of a question. Asked again, as
`sevenfold bench serve` does, all but the last 16 are found; with another question each time, all
but 80. Prints of both, and of the first behind a whole prefill, medians and least of the wall's
microseconds by part, without a profiler; of the first the GPU's time from the launch to the token's
copy, by events, the recorded prefills alone, one replay behind another, and of both turns under a
profiler each call that gave the GPU something, when it came and when the GPU did it, with kernels
by their time and the standstills between them. What is measured is written at the end. A last word
`tiny` tries it on a CPU, where nothing is recorded, with the host's operators.
"""

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sevenfold.bench.serving.sides import Serving, random_ids
from sevenfold.engine.device.capture import Captured
from sevenfold.engine.heap import freeze_heap
from sevenfold.engine.token_ids import TokenIds
from sevenfold.engine.transfer import Arriving
from sevenfold.models import HybridModel, init_weights, preset

TINY = sys.argv[2:] == ["tiny"]
DEVICE = torch.device("cpu" if TINY else "cuda")
PRESET, CHAT_TOKENS = ("nano", 256) if TINY else ("bench-2b", 32_768)
ANSWER_TOKENS, QUESTION_TOKENS, REPEATS, PROFILED, REPLAYS = 16, 64, 30, 3, 200
SHOWN_KERNELS, NAME_CHARACTERS = 20, 90
SALT = b"chat"
# From the call to each of these; the last is the request let go of.
PARTS = (
    "submit",
    "plan: lookup, memory",
    "the row's inputs",
    "replay",
    "choice, copy back",
    "wait",
    "event",
    "let go",
)
BORDERS = (
    "submitted",
    "planned",
    "filled",
    "launched",
    "waiting",
    "arrived",
    "told",
    "let go",
)
marks = {}
events = {}


def mark(border):
    marks[border] = time.perf_counter()


def note(kind):
    """Let the GPU note when it comes here."""
    if events.get("on"):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events[kind] = event


def wrapped(owner, name, before, after):
    """Do something before and after a method of an object or of a class."""
    run = getattr(owner, name)

    def noted(*args, **options):
        before()
        result = run(*args, **options)
        after()
        return result

    setattr(owner, name, noted)


def nothing():
    pass


def watch(engine):
    """Note the borders of the parts; each costs the host less than a microsecond."""
    worker = engine._worker
    wrapped(engine, "submit", nothing, lambda: mark("submitted"))
    wrapped(engine.scheduler, "step", nothing, lambda: marks.setdefault("planned", clock()))
    wrapped(worker, "prefill", lambda: note("begun"), nothing)
    wrapped(Arriving, "numbers", lambda: (note("copied"), mark("waiting")), lambda: mark("arrived"))
    wrapped(engine, "step", nothing, lambda: marks.setdefault("told", clock()))
    if TINY:
        wrapped(worker, "_run", lambda: mark("filled"), lambda: mark("launched"))
        return {}
    recorded = worker.runner._prefills._recorder.recorded
    captured = {size: entry[1] for size, entry in sorted(recorded.items())}
    for size, (inputs, own) in list(recorded.items()):
        recorded[size] = (inputs, Captured(noted(own), own.output))
    return captured


def noted(captured):
    def replay():
        note("replayed")
        mark("filled")
        captured.replay()
        mark("launched")
        note("computed")

    return replay


clock = time.perf_counter


def wait_for_gpu():
    if not TINY:
        torch.cuda.synchronize()


def turn(serving, prompt):
    """Serve it; microseconds of each part."""
    wait_for_gpu()
    marks.clear()
    began = clock()
    serving.submit(prompt, 1, salt=SALT)
    serving.run()
    mark("let go")
    borders = [began, *(marks[border] for border in BORDERS)]
    return [(b - a) * 1e6 for a, b in pairwise(borders)]


def parts_of(rows):
    parts = zip(PARTS, zip(*rows, strict=True), strict=True)
    found = {name: [statistics.median(values), min(values)] for name, values in parts}
    whole = [sum(row) for row in rows]
    return found | {"in all": [statistics.median(whole), min(whole)]}


def on_gpu(serving, prompt):
    """Microseconds of the GPU: from the state's copy to the replay, in it, and behind it."""
    events["on"], rows = True, []
    for _ in range(REPEATS):
        turn(serving, prompt)
        torch.cuda.synchronize()
        at = [events[name] for name in ("begun", "replayed", "computed", "copied")]
        rows.append([a.elapsed_time(b) * 1e3 for a, b in pairwise(at)])
    events.clear()
    names = ("before the replay", "the replay", "behind it")
    columns = zip(*rows, strict=True)
    return {n: [statistics.median(x), min(x)] for n, x in zip(names, columns, strict=True)}


def replay_us(captured):
    """Microseconds of a replay that follows another, and of the host in its call."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    for _ in range(REPLAYS):
        captured.replay()
    ended.record()
    torch.cuda.synchronize()
    calls = []
    for _ in range(20):
        at = clock()
        captured.replay()
        calls.append((clock() - at) * 1e6)
        torch.cuda.synchronize()
    return {
        "of the GPU": began.elapsed_time(ended) * 1e3 / REPLAYS,
        "of the call": statistics.median(calls),
    }


def traced(serving, prompt):
    """The events of one turn under a profiler."""
    kinds = [ProfilerActivity.CPU] + ([] if TINY else [ProfilerActivity.CUDA])
    wait_for_gpu()
    with profile(activities=kinds) as recorded:
        with record_function("turn"):
            turn(serving, prompt)
        wait_for_gpu()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        found = json.loads(path.read_text())["traceEvents"]
    found = [event for event in found if event.get("ph") == "X" and "cat" in event]
    whole = next(e for e in found if e["name"] == "turn" and e["cat"] == "user_annotation")
    inside = [e for e in found if whole["ts"] <= e["ts"] <= whole["ts"] + whole["dur"]]
    for event in inside:
        event["ts"] -= whole["ts"]
    return sorted(inside, key=lambda event: event["ts"])


def timeline(found):
    """Each call of the driver that gave the GPU work, and what came of it; kernels and gaps."""
    work = defaultdict(list)
    for event in found:
        if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset"):
            work[event["args"].get("correlation")].append(event)
    calls = []
    for event in found:
        own = work.get(event.get("args", {}).get("correlation"))
        if event["cat"] in ("cuda_runtime", "cuda_driver") and own:
            calls.append(
                {
                    "call": event["name"],
                    "at_us": event["ts"],
                    "host_us": event["dur"],
                    "on_gpu_at_us": own[0]["ts"],
                    "gpu_us": max(e["ts"] + e["dur"] for e in own) - own[0]["ts"],
                    "num": len(own),
                    "first": own[0]["name"][:NAME_CHARACTERS],
                }
            )
    whole = sorted((e for own in work.values() for e in own), key=lambda e: e["ts"])
    return {"calls": calls, "kernels": by_name(whole), **standstills(whole)}


def by_name(work):
    found = defaultdict(lambda: [0.0, 0])
    for event in work:
        found[event["name"][:NAME_CHARACTERS]][0] += event["dur"]
        found[event["name"][:NAME_CHARACTERS]][1] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1][0])[:SHOWN_KERNELS])


def standstills(work):
    """Microseconds of the GPU with work, without any between two of it, and the longest."""
    busy, reached, gaps = 0.0, None, []
    for event in work:
        begin, end = event["ts"], event["ts"] + event["dur"]
        if reached is not None and begin > reached:
            gaps.append((begin - reached, begin, event["name"][:NAME_CHARACTERS]))
        busy += max(0.0, end - max(begin, reached or begin))
        reached = max(end, reached or end)
    return {
        "busy_us": busy,
        "idle_us": sum(gap for gap, _, _ in gaps),
        "num_gaps": len(gaps),
        "longest": sorted(gaps, reverse=True)[:8],
    }


def operators(found):
    """Host's operators of a turn: microseconds and how often."""
    return by_name([event for event in found if event["cat"] == "cpu_op"])


def show_pairs(title, pairs):
    print(f"\n{title}; us, median (least)")
    for name, (median, least) in pairs.items():
        print(f"  {name:22} {median:9.1f} ({least:.1f})")


def show_trace(row):
    print("\na turn under a profiler: call, at, host us; GPU at, us, things, first of them")
    for call in row["calls"]:
        print(
            f"  {call['call'][:24]:24} {call['at_us']:9.1f} {call['host_us']:7.1f}; "
            f"{call['on_gpu_at_us']:9.1f} {call['gpu_us']:8.1f} {call['num']:4} "
            f"{call['first'][:60]}"
        )
    print(f"  busy {row['busy_us']:.1f} us, idle between {row['idle_us']:.1f} in {row['num_gaps']}")
    for gap, at, name in row["longest"]:
        print(f"    {gap:8.1f} us before {name[:60]} at {at:.1f}")
    show_kernels(row["kernels"])


def show_kernels(kernels):
    print("  us, times")
    for name, (us, num) in kernels.items():
        print(f"    {us:9.1f} {num:5} {name}")


def question(config, chat, number, tokens=QUESTION_TOKENS):
    """The chat with a question of that number."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(config.vocab_size, (tokens,), generator=generator)
    return TokenIds((*chat, *ids.tolist()))


def built():
    config = preset(PRESET)
    if not TINY:  # as `sevenfold bench serve` has it, whose peer rotates whole heads
        config = config.model_copy(update={"rotary_dim": config.head_dim})
    with DEVICE:
        model = init_weights(HybridModel(config), seed=0, drawn_on=DEVICE)
    model = model.to(torch.float32 if TINY else torch.bfloat16).eval().requires_grad_(False)
    memory = 64 << 20 if TINY else int(0.3 * torch.cuda.mem_get_info()[0])
    return config, Serving(model, memory_bytes=memory)


def main():
    """Serve the first turn, then time second ones."""
    config, serving = built()
    name = "cpu" if TINY else torch.cuda.get_device_name()
    print(name, torch.__version__)
    first = random_ids(config, CHAT_TOKENS).tolist()
    asked = serving.submit(first, ANSWER_TOKENS, salt=SALT, turn=CHAT_TOKENS)
    serving.run()
    chat = (*first, *asked.generated)
    prompt = question(config, chat, 0)
    sizes = [question(config, chat, n + 1, n) for n in (4, 48, 64, 100)]  # all recorded ones
    for warm in (prompt, prompt, prompt, *sizes, question(config, chat, 2)):
        serving.submit(warm, 1, salt=SALT)
        serving.run()
    freeze_heap()
    captured = watch(serving.engine)
    rows = {"device": name}
    rows["asked again"] = parts_of([turn(serving, prompt) for _ in range(REPEATS)])
    show_pairs("asked again", rows["asked again"])
    others = [turn(serving, question(config, chat, 3 + n)) for n in range(REPEATS)]
    rows["another question"] = parts_of(others)
    show_pairs("another question each time", rows["another question"])
    later = []
    for _ in range(REPEATS // 3):
        serving.submit(prompt, 1)
        serving.run()
        later.append(turn(serving, prompt))
    rows["behind a whole prefill"] = parts_of(later)
    show_pairs("asked again behind a whole prefill", rows["behind a whole prefill"])
    if captured:
        rows["on the GPU"] = on_gpu(serving, prompt)
        show_pairs("of the GPU, asked again", rows["on the GPU"])
        rows["replays"] = {size: replay_us(one) for size, one in captured.items() if size <= 128}
        print("\nreplays behind one another by recorded tokens, us", rows["replays"])
    for name, prompts in (
        ("asked again", [prompt] * PROFILED),
        ("another question", [question(config, chat, 100 + n) for n in range(PROFILED)]),
    ):
        trace = [traced(serving, own) for own in prompts][-1]
        rows[f"traced, {name}"] = operators(trace) if TINY else timeline(trace)
        show = show_kernels if TINY else show_trace
        show(rows[f"traced, {name}"])
    Path(sys.argv[1]).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
