"""What the host does in the second turn of a chat: second_turn.py [REPEATS]

The engine over a runner for a GPU that launches nothing, on a CPU, with bench-2b's pages: a first
turn of 32,768 tokens, then prompts of 32,848, of which 16 are new, whose ids are other objects each
time, and packed, as a server has them. Prints medians and the least of the thread's own
microseconds by part, of turns that follow each other, and of turns behind what leaves the
processor's caches to others: the whole prompt under another salt, a pass over 64 MB, and a wait as
long as a GPU computes it; and of turns of another chat each time, as `sevenfold bench serve` has
them: 16 tokens asked for behind a question of 64, behind the chat's first turn, the same pass and
wait.
"""

import statistics
import sys
import time
from functools import cache

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from sevenfold.bench.serving.sides import random_ids
from sevenfold.engine import SamplingParams
from sevenfold.engine import choosing as choosing_module
from sevenfold.engine import worker as worker_module
from sevenfold.engine.device import DeviceRunner
from sevenfold.engine.device.capture import Captured
from sevenfold.engine.engine import Engine
from sevenfold.engine.heap import freeze_heap
from sevenfold.engine.memory import plan_memory
from sevenfold.engine.request import Request
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.token_ids import TokenIds
from sevenfold.engine.transfer import Arriving
from sevenfold.models import HybridModel, init_weights, preset

CHAT_TOKENS, ANSWER_TOKENS, QUESTION_TOKENS, PAGE_TOKENS = 32_768, 16, 64, 64
PARTS = ("submit", "plan", "inputs", "choice", "event", "let go")
BORDERS = ("submitted", "planned", "launched", "waiting", "told", "let go")
WAIT_S, PASSED_BYTES = 0.09, 64 << 20
SIZES = (16, 80, 8192)
TOKEN = 5
times = {}


def clock():
    return time.thread_time()


def record(run):
    """A capture whose replay notes the time, and leaves what there is."""
    return Captured(lambda: times.setdefault("launched", clock()), run())


def noting(owner, name, border):
    """Note the time behind each call of a method."""
    run = getattr(owner, name)

    def noted(*args, **options):
        result = run(*args, **options)
        times[border] = clock()
        return result

    setattr(owner, name, noted)


class Runner(DeviceRunner):
    """Computes nothing: long chunks are not recorded, and have the same logits."""

    def _prefill(self, rows):
        if self._prefills.size_of(rows) is not None:
            return super()._prefill(rows)
        return given(len(rows))

    def _prefill_step(self, inputs):
        inputs.chosen[:] = torch.tensor([TOKEN, 1])
        return given(1)


def given(num_rows):
    logits = torch.zeros(num_rows, VOCAB)
    logits[:, TOKEN] = 1
    return logits


class Watched(Arriving):
    """Notes when the host begins to wait."""

    def numbers(self):
        times.update(waiting=clock())
        return super().numbers()


def make_runner(model, storage, *_, **__):
    sizes = {"batch_sizes": (1,), "prefill_sizes": SIZES}
    return Runner(model, storage, page_tokens=PAGE_TOKENS, capture=record, **sizes)


def new_engine(num_bytes):
    """Of a small model with 56 pages to a state, as bench-2b has."""
    small = {"hidden_size": 32, "num_attention_heads": 64, "num_key_value_heads": 1}
    small |= {"head_dim": 16, "intermediate_size": 32, "rotary_dim": 8, "moe": None}
    config = preset("bench-2b").model_copy(update=small)
    model = init_weights(HybridModel(config), seed=0).eval().requires_grad_(False)
    size = {"page_tokens": PAGE_TOKENS, "kv_element_bytes": 4, "context_tokens": CHAT_TOKENS}
    plan = plan_memory(config, budget_bytes=num_bytes, **size)
    limits = {"max_request_tokens": 2 * CHAT_TOKENS, "lone_chunk_tokens": CHAT_TOKENS}
    tokenizer = Tokenizer(BPE({f"<{n}>": n for n in range(VOCAB)}, []))
    return Engine(model, tokenizer, plan, SchedulerConfig(page_tokens=PAGE_TOKENS, **limits))


@cache
def greedy(new_tokens):
    return SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)


def submit(engine, name, prompt, new_tokens, marks=(), salt=b"chat"):
    request = Request(name, prompt, new_tokens, marks=marks, salt=salt)
    engine.submit(request, greedy(new_tokens))
    return request


def serve(engine):
    while engine.has_work:
        engine.step()


def turn(engine, name, prompt, new_tokens=1, salt=b"chat"):
    """Seconds of each part to the first token, and tokens that were cached."""
    times.clear()
    began = clock()
    request = submit(engine, name, prompt, new_tokens, salt=salt)
    times["submitted"] = clock()
    events = engine.step()
    times["told"] = clock()
    # These are of the first step.
    noted = dict(times)
    serve(engine)
    noted["let go"] = clock()
    if [event.token_id for event in events] != [TOKEN]:
        raise SystemExit(f"one step must give the token, got {events}")
    return np.diff([began, *(noted[border] for border in BORDERS)]), request.num_cached_tokens


def cool(engine, name, prompt, passed):
    """Leave the caches to others: a prompt of another salt, a pass over memory, and a wait."""
    submit(engine, name, prompt, 1, salt=name.encode())
    serve(engine)
    let_pass(passed)


def let_pass(passed):
    passed += 1
    time.sleep(WAIT_S)


def of_another_chat(engine, name, first, question, passed):
    """As turn, of a chat whose first turn is served before."""
    salt = name.encode()
    asked = submit(engine, f"{name} first", first, ANSWER_TOKENS, marks=(len(first),), salt=salt)
    serve(engine)
    prompt = TokenIds(np.array([*first, *asked.generated, *question]).tolist())
    let_pass(passed)
    return turn(engine, name, prompt, ANSWER_TOKENS, salt)[0]


VOCAB = preset("bench-2b").vocab_size


def main():
    torch.set_num_threads(1)
    repeats = int(sys.argv[1]) if sys.argv[1:] else 100
    worker_module.make_runner = make_runner
    choosing_module.Arriving = Watched
    engine = new_engine((600 + 40 * repeats) << 20)  # each whole prompt and each chat stays
    first, question = (
        random_ids(preset("bench-2b"), n).tolist() for n in (CHAT_TOKENS, QUESTION_TOKENS)
    )
    asked = submit(engine, "first", TokenIds(first), ANSWER_TOKENS, marks=(CHAT_TOKENS,))
    serve(engine)
    second = np.array([*first, *asked.generated, *question])
    noting(engine.scheduler, "step", "planned")
    passed = np.zeros(PASSED_BYTES // 8)
    for n in range(3):  # of the first all but 80 are found
        submit(engine, f"warm {n}", TokenIds(second.tolist()), 1)
        serve(engine)
    freeze_heap()  # as a server and `sevenfold bench` do
    hot, cold, other = [], [], []
    for n in range(repeats):
        hot.append(turn(engine, f"hot {n}", TokenIds(second.tolist()))[0])
    for n in range(repeats):
        prompt = TokenIds(second.tolist())
        cool(engine, f"whole {n}", prompt, passed)
        row, cached = turn(engine, f"cold {n}", prompt)
        cold.append(row)
    for n in range(repeats + 1):
        row = of_another_chat(engine, f"chat {n}", TokenIds(first), question, passed)
        other += [row] if n else []
    print(f"{cached:,} of {len(second):,} tokens cached; us, median (least) of {repeats}")
    kinds = map(with_sum, (hot, cold, other))
    print(f"  {'':14} {'hot':>16} {'cold':>16} {'another chat':>16}")
    for name, *three in zip((*PARTS, "to the token"), *kinds, strict=True):
        print(
            f"  {name:14}", *(f"{statistics.median(x):8.1f} {f'({min(x):.1f})':>7}" for x in three)
        )


def with_sum(rows):
    """Microseconds by part, and of those that the first token waits for."""
    parts = np.array(rows) * 1e6
    waited = [PARTS.index(part) for part in ("submit", "plan", "inputs", "event")]
    return [*parts.T, parts[:, waited].sum(1)]


if __name__ == "__main__":
    main()
