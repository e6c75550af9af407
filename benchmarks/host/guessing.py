"""What guesses cost the host from a token to the next launch: guessing.py [REPEATS]

The engine over a runner for a GPU that launches nothing, on a CPU, with bench-2b's 14 lightning
layers and 512 tokens of `sevenfold bench speculate`'s hostile text, of which there is always a
guess and it is wrong. Prints of each engine, by turns: medians, 99 of 100 and the sum of that time,
of what speculation does before the launch and behind it, and how often and how long Python's
garbage collector ran. Microseconds of the wall, but for sums.
"""

import gc
import statistics
import sys
import time
from collections import defaultdict

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from sevenfold.bench.serving.speculation import _misleading
from sevenfold.engine import SamplingParams
from sevenfold.engine import worker as worker_module
from sevenfold.engine.device import DeviceRunner
from sevenfold.engine.device.capture import Captured
from sevenfold.engine.engine import Engine
from sevenfold.engine.memory import plan_memory
from sevenfold.engine.request import Request
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.speculation import RING_TOKENS, PromptLookupConfig, Speculator
from sevenfold.engine.transfer import Arriving
from sevenfold.models import HybridModel, init_weights, preset

NEW_TOKENS, PAGE_TOKENS = 512, 64
VOCAB = preset("bench-2b").vocab_size
CIRCLE = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))[: NEW_TOKENS + 2]
PROMPT = _misleading(CIRCLE).tolist()
NEXT = torch.zeros(VOCAB, dtype=torch.int64)
NEXT[CIRCLE] = CIRCLE.roll(-1)
clock = time.perf_counter
spent, arrived = defaultdict(list), []


def record(run):
    """A capture that runs anew at each replay."""
    return Captured(run, run())


class Runner(DeviceRunner):
    """Computes nothing, and gives the circle's next token."""

    def run_ahead(self, rows, tokens):
        if arrived:
            spent["token to launch"].append(clock() - arrived[-1])
        return super().run_ahead(rows, tokens)

    def _step(self, inputs):
        inputs.chosen[0, 0], inputs.chosen[0, 1] = NEXT[inputs.chosen[0, 0]], 1
        return torch.zeros(1, VOCAB)

    def _prefill_step(self, inputs):
        logits = torch.zeros(1, VOCAB)
        logits[0, NEXT[PROMPT[-1]]] = 1
        return logits


class Collections:
    """Notes how long each collection took, by generation."""

    def __init__(self):
        gc.callbacks.append(self)

    def __call__(self, phase, info):
        if phase == "start":
            self.began = clock()
        else:
            spent[f"collection {info['generation']}"].append(clock() - self.began)


def timed(owner, name, label):
    run = getattr(owner, name)

    def noted(*args, **options):
        began = clock()
        result = run(*args, **options)
        spent[label].append(clock() - began)
        return result

    setattr(owner, name, noted)


def new_engine(speculation):
    small = {"hidden_size": 32, "num_attention_heads": 64, "num_key_value_heads": 1}
    small |= {"head_dim": 16, "intermediate_size": 32, "rotary_dim": 8, "moe": None}
    config = preset("bench-2b").model_copy(update=small)
    model = init_weights(HybridModel(config), seed=0).eval().requires_grad_(False)
    size = {"page_tokens": PAGE_TOKENS, "kv_element_bytes": 4, "context_tokens": 4096}
    rings = RING_TOKENS if speculation else 0
    plan = plan_memory(config, budget_bytes=600 << 20, ring_tokens=rings, **size)
    tokenizer = Tokenizer(BPE({f"<{n}>": n for n in range(VOCAB)}, []))
    limits = SchedulerConfig(page_tokens=PAGE_TOKENS, max_request_tokens=4096)
    return Engine(model, tokenizer, plan, limits, speculation=speculation)


def decode(engine, name):
    """Serve the text; what it took is in `spent`."""
    arrived.clear()
    request = Request(name, tuple(PROMPT), NEW_TOKENS, salt=name.encode())
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    engine.submit(request, params)
    while not request.generated:
        engine.step()
    arrived.clear()
    spent.clear()
    while engine.has_work:
        engine.step()
    return request


def show(name, request):
    print(f"{name}: {request.num_drafted_tokens} guesses checked")
    for part, seconds in sorted(spent.items()):
        us = sorted(1e6 * s for s in seconds)
        late = us[int(0.99 * len(us))]
        print(
            f"  {part:18} {len(us):4} times, {statistics.median(us):7.1f}, 99 of 100 within "
            f"{late:7.1f}, longest {us[-1]:8.1f}; {sum(us) / 1e3:.1f} ms in all"
        )


def watched(arriving, numbers=Arriving.numbers):
    """Its numbers; notes when they are there."""
    found = numbers(arriving)
    arrived.append(clock())
    return found


def main():
    torch.set_num_threads(1)
    repeats = int(sys.argv[1]) if sys.argv[1:] else 3
    sizes = {"batch_sizes": (1,), "prefill_sizes": (64, 4096)}
    worker_module.make_runner = lambda model, storage, *_, **__: Runner(
        model, storage, page_tokens=PAGE_TOKENS, capture=record, **sizes
    )
    Arriving.numbers = watched
    timed(Speculator, "propose", "before: propose")
    timed(Speculator, "read", "behind: read")
    timed(Speculator, "note_plain", "behind: note_plain")
    guessing = PromptLookupConfig(draft_tokens=15)
    engines = {"plain": new_engine(None), "guessing": new_engine(guessing)}
    Collections()
    for number in range(-1, repeats):  # the first warms up
        for name, engine in engines.items():
            request = decode(engine, f"{name} {number}")
            if number >= 0:
                show(name, request)


if __name__ == "__main__":
    main()
