"""A crowd through the runner that records steps on a GPU, on a CPU: by ranks, and by one process.

A recording is stood in for by a function that runs anew on the same buffers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from parallel_generation import CHAIN, TREE, Leading, byte_tokenizer
from torch import Tensor

from sevenfold.engine import SamplingParams
from sevenfold.engine import worker as worker_module
from sevenfold.engine.device import DeviceRunner, DeviceVerifier
from sevenfold.engine.device.capture import Captured
from sevenfold.engine.engine import Engine
from sevenfold.engine.options import worker_config
from sevenfold.engine.request import Request
from sevenfold.engine.sizing import size_engine
from sevenfold.engine.tensor_parallel import Channel, follow
from sevenfold.engine.tensor_parallel import leader as leader_module
from sevenfold.engine.worker import Worker
from sevenfold.models import HybridModel

SIZES, PREFILL_SIZES = (1, 2, 4), (16, 64)
# Prompt tokens, new tokens, temperature: what ends changes rows, and what is drawn is shared.
CROWD = ((90, 14, 0.0), (1, 9, 0.0), (45, 20, 0.0), (7, 6, 0.8), (30, 17, 0.0), (12, 11, 0.0))


class Capture:
    """Runs what it should record; counts what is replayed."""

    def __init__(self) -> None:
        self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Captured:
        output = run().clone()

        def replay() -> None:
            self.replayed += 1
            output.copy_(run())

        return Captured(replay, output)


@contextmanager
def device_runners(capture: Capture | None) -> Iterator[None]:
    """Workers take the runner for a GPU."""

    def make(model: HybridModel, storage: Any, limits: tuple[int, int], *_: object, **__: object):
        return DeviceRunner(
            model,
            storage,
            page_tokens=limits[0],
            batch_sizes=SIZES,
            prefill_sizes=PREFILL_SIZES if capture else (),
            capture=capture,
        )

    held, worker_module.make_runner = worker_module.make_runner, make
    try:
        yield
    finally:
        worker_module.make_runner = held


def serve_recorded(
    model: HybridModel, channel: Channel | None, *, records: bool = True
) -> list[dict[str, Any]]:
    """What every kind of serving gave, recorded and told, on this rank."""
    found = []
    for speculation in (None, CHAIN, TREE):
        capture = Capture() if records else None
        plan, config = size_engine(model, budget_bytes=4 << 20, speculation=speculation)
        config = config.model_copy(update={"max_running": 4})
        tokens, ahead = None, {}
        with device_runners(capture), watched(ahead):
            if channel is None or channel.is_first:
                ranks = None if channel is None else Leading(model, channel)
                engine = Engine(
                    model, byte_tokenizer(), plan, config, speculation=speculation, ranks=ranks
                )
                worker = engine._worker
                worker.warm_up(48, 32, lambda _: None)
                tokens = crowd(engine)
                if ranks is not None:
                    ranks.worker.stop()
            else:
                worker = Worker(model, plan, worker_config(config, None, speculation))
                follow(worker, channel)
        found.append(
            {
                "tokens": tokens,
                "recorded": recorded_sizes(worker),
                "replayed": capture and capture.replayed,
                "ahead": ahead,
            }
        )
    return found


@contextmanager
def watched(counts: dict[str, int]) -> Iterator[None]:
    """Count the steps that the first rank ran ahead, and what it had to tell and share."""
    counts |= {"steps": 0, "shared": 0, "told rows": 0}
    next_step = leader_module.Orders.next_step

    def count(orders: Any, step: Any) -> None:
        counts["steps"] += 1
        counts["shared"] += not step.is_own
        counts["told rows"] += step.rows is not None
        next_step(orders, step)

    leader_module.Orders.next_step = count
    try:
        yield
    finally:
        leader_module.Orders.next_step = next_step


def recorded_sizes(worker: Worker) -> list[tuple[str, ...]]:
    """What was recorded, in its order."""
    runner, verifier = worker.runner, worker._verifier
    assert isinstance(runner, DeviceRunner)
    recorders = {"steps": runner._graphs and runner._graphs._recorder}
    recorders["prefills"] = runner._prefills and runner._prefills._recorder
    if isinstance(verifier, DeviceVerifier):
        recorders["drafts"] = verifier._recorder
    return [
        (kind, str(size))
        for kind, recorder in recorders.items()
        if recorder is not None
        for size in recorder.recorded
    ]


def crowd(engine: Engine) -> list[list[int]]:
    """Tokens of requests that come one after another, and run side by side."""
    random, requests = torch.Generator().manual_seed(5), []
    waiting = list(CROWD)
    while waiting or engine.has_work:
        if waiting:
            num_prompt, num_new, temperature = waiting.pop(0)
            ids = torch.randint(9, (num_prompt,), generator=random).tolist()
            request = Request(str(len(requests)), tuple(ids), num_new)
            params = SamplingParams(
                temperature=temperature,
                max_tokens=num_new,
                ignore_eos=True,
                seed=3 if temperature else None,
            )
            engine.submit(request, params)
            requests.append(request)
        for _ in range(3):
            engine.step()
    return [request.generated for request in requests]
