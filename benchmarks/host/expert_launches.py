"""How soon a rank of experts launches once it has the counts: expert_launches.py [REPEATS [RANKS]]

The first of two ranks, or of 4 or 8, on a CPU, in a group that exchanges nothing: 16 tokens of 32
numbers to 2 of 8 experts each, so that the host's own work is what takes time. Prints medians and
the least of microseconds after the counts have come: until the exchange is launched, until the
first own rows are, until those are done, and until the forward is; then of the whole forward and
backward. Copies to a device, and what its launches take, are no part of it.
"""

import statistics
import sys
import time
from types import SimpleNamespace

import torch
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from sevenfold.models import preset
from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.parallel import ParallelConfig
from sevenfold.parallel.collectives import Flight
from sevenfold.parallel.exchange import Collective
from sevenfold.parallel.expert_runs import ExpertRuns
from sevenfold.parallel.experts import ExpertRoute
from sevenfold.parallel.layout import place_of
from sevenfold.parallel.reading import Reading

TOKENS, WIDTH, WARM_UP = 16, 32, 50
PARTS = ("exchange", "first rows", "first rows done", "forward done")
stamps = []


def stamped(owner, name, before, after):
    """Note the time around a method."""
    method = getattr(owner, name)

    def told(*arguments):
        if before:
            stamps.append((before, time.perf_counter()))
        result = method(*arguments)
        if after:
            stamps.append((after, time.perf_counter()))
        return result

    setattr(owner, name, told)


def route_of(num_ranks):
    parallel = ParallelConfig(shard=num_ranks, expert=num_ranks)
    size = {"hidden_size": WIDTH, "intermediate_size": WIDTH}
    config = preset("bench-2b").model_copy(update=size)
    moe = MixtureOfExperts(config, config.moe).train()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(moe.experts, name)
        weight.data = weight.data.chunk(num_ranks)[0].clone()
    layout = SimpleNamespace(
        config=parallel,
        place=place_of(parallel, 0),
        group=lambda name: dist.group.WORLD,
        expert_exchange=Collective(dist.group.WORLD),
    )
    return ExpertRoute(moe, layout)


def main():
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    num_ranks = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    route = route_of(num_ranks)
    experts = torch.arange(2 * TOKENS).view(TOKENS, 2) % 8
    counts = torch.full((num_ranks, 1, 8), 2 * TOKENS // 8)
    read = Reading.__init__
    # A group that exchanges nothing gathers nothing, either.
    Reading.__init__ = lambda self, x: read(self, counts)
    stamped(Reading, "numbers", None, "counts")
    stamped(Flight, "start", "exchange", None)
    stamped(ExpertRuns, "__call__", "first rows", "first rows done")
    tokens = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weights = torch.full((TOKENS, 2), 0.5, requires_grad=True)
    found = {part: [] for part in (*PARTS, "whole forward", "backward")}
    for number in range(WARM_UP + repeats):
        stamps.clear()
        began = time.perf_counter()
        y, _ = route(tokens, weights, experts)
        ended = time.perf_counter()
        first = dict(reversed([*stamps, ("forward done", ended)]))
        y.sum().backward()
        if number >= WARM_UP:
            for part in PARTS:
                found[part].append(first[part] - first["counts"])
            found["whole forward"].append(ended - began)
            found["backward"].append(time.perf_counter() - ended)
    for part, times in found.items():
        print(f"{part:<16} {1e6 * statistics.median(times):7.0f} us (least {1e6 * min(times):.0f})")
    dist.destroy_process_group()


main()
