"""Time decoding steps of the engine, and what the GPU does in them.

python benchmarks/gpu/decode_step.py [BATCH ...]
python benchmarks/gpu/decode_step.py ranks [BATCH ...]      (two GPUs: the first rank's)

Of bench-2b in bf16 with random weights, greedy, for each batch (1 by default), prompts of 512:

    wall      from step to step, as a caller sees it; and how long of it the host waits for tokens:
              where it hardly waits, it is the host that bounds the step
    replay    the recorded step by itself, one behind another; not of ranks, which replay together
    trace     each kernel's calls, time and idle time before it, a step; where a step's longest
              pauses are
    host      the functions of a step that take the host longest

A trace slows kernels down and keeps launches from overlapping: its sums exceed the wall time.
"""

import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
from tensor_parallel import save
from torch.profiler import ProfilerActivity, profile

from sevenfold.bench.serving.sides import Serving, random_ids
from sevenfold.engine import TextModel
from sevenfold.engine.transfer import Arriving
from sevenfold.models import HybridModel, init_weights, preset

warnings.filterwarnings("ignore", ".*has no tuning.*")
PROMPT_TOKENS, STEPS, TRACED = 512, 300, 20
GPU = torch.device("cuda")


def started(serving, batch):
    """Submit a batch, and take steps until all of it decodes ahead."""
    for prompt in random_ids(serving.source.model.config, batch, PROMPT_TOKENS).tolist():
        serving.submit(prompt, 3 * STEPS)
    while serving.engine.scheduler.num_decoding < batch:
        serving.engine.step()
    for _ in range(10):
        serving.engine.step()


def drained(serving):
    for request in list(serving.engine._underway):
        serving.engine.cancel(request)
    serving.run()


def time_wall(engine, batch):
    waits, numbers = [], Arriving.numbers

    def timed(arriving):
        began = time.perf_counter()
        found = numbers(arriving)
        waits.append(time.perf_counter() - began)
        return found

    steps = []
    with mock.patch.object(Arriving, "numbers", timed):
        for _ in range(STEPS):
            began = time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - began)
    wall, waited = (statistics.median(x) * 1e6 for x in (steps, waits))
    mean = statistics.mean(steps) * 1e6
    print(
        f"wall      median {wall:.1f} us, mean {mean:.1f}, {batch / mean * 1e6:.0f} tokens/s; "
        f"the host waits {waited:.1f} us of it",
        flush=True,
    )


def time_replay(engine, num=50):
    """The step that was recorded last; its rows no longer count, and it goes on by itself."""
    size, (_, captured) = list(engine._worker.runner._graphs._recorder.recorded.items())[-1]
    times = []
    for _ in range(5):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        for _ in range(num):
            captured.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1000 / num)
    began = time.perf_counter()
    captured.replay()
    host = (time.perf_counter() - began) * 1e6
    torch.cuda.synchronize()
    print(
        f"replay    {size}: {statistics.median(times):.1f} us, {host:.0f} us of the host",
        flush=True,
    )


def traced(engine):
    """What ran on the GPU in some steps: (name, start, end) in us, in order."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(TRACED):
            engine.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    rows = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds]
    return sorted(rows, key=lambda row: row[1])


def print_trace(rows):
    names, ended, pauses = {}, rows[0][1], {}
    for name, start, end in rows:
        pause = max(0.0, start - ended)
        calls, spent, idle = names.get(name, (0, 0.0, 0.0))
        names[name] = (calls + 1, spent + end - start, idle + pause)
        ended = max(ended, end)
        pauses.setdefault(name, []).append(pause)
    whole = (rows[-1][2] - rows[0][1]) / TRACED
    print(f"trace     {whole:.1f} us a step; calls, us, and idle us before them, a step")
    for name, (calls, spent, idle) in sorted(names.items(), key=lambda one: -one[1][1]):
        each = (x / TRACED for x in (calls, spent, idle))
        print("          {:6.1f} {:8.1f} {:8.1f}  ".format(*each) + name[:70])
    longest = sorted(names, key=lambda name: -statistics.median(pauses[name]))[:6]
    for name in longest:
        print(
            f"          pause before {name[:60]}: median {statistics.median(pauses[name]):.1f} us"
        )
    print("          around the copy to the host, of the middle step:")
    copies = [n for n, (name, *_) in enumerate(rows) if "DtoH" in name]
    middle = copies[len(copies) // 2] if copies else len(rows) // 2
    for name, start, end in rows[max(0, middle - 4) : middle + 6]:
        print(f"          {start - rows[middle][1]:8.1f} {end - start:7.1f}  {name[:70]}")


def print_host(engine):
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(200):
        engine.step()
    profiler.disable()
    print("host      seconds of 200 steps, profiled", flush=True)
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(28)


def whole():
    with GPU:
        model = init_weights(HybridModel(preset("bench-2b")), seed=0, drawn_on=GPU)
    return Serving(model.to(GPU, torch.bfloat16).eval().requires_grad_(False))


def of_two_ranks(folder):
    save("bench-2b", "cuda", folder)
    source = TextModel.load(folder, device="cuda", tensor_parallel=2)
    return Serving(source.model, memory_bytes=8 << 30, ranks=source.ranks), source.ranks


def main():
    batches = sys.argv[1:]
    if batches[:1] != ["ranks"]:
        measure(whole(), batches, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        serving, ranks = of_two_ranks(Path(folder) / "model")
    try:
        measure(serving, batches[1:], ranks)
    finally:
        ranks.close()


def measure(serving, batches, ranks):
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for batch in map(int, batches or ["1"]):
        print(f"batch {batch}", flush=True)
        started(serving, batch)
        time_wall(serving.engine, batch)
        print_trace(traced(serving.engine))
        print_host(serving.engine)
        drained(serving)
        if ranks is None:
            time_replay(serving.engine)


if __name__ == "__main__":
    main()
