"""Runs jobs in several processes over gloo; they are forked, so the imports are paid once.

Reads orders as lines of JSON, and answers each with "done" or "failed"; what the ranks say is in
the file "errors" of the job's folder.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import copies_over_gloo
import parallel_cases
import parallel_choices
import parallel_failures
import parallel_generation
import parallel_recorded
import parallel_validation
import torch
from numba.core.registry import cpu_target
from parallel_helpers import build, take_step
from torch import distributed as dist

from sevenfold.config import SevenfoldError
from sevenfold.engine.tensor_parallel import Channel
from sevenfold.parallel import Layout, ParallelConfig, divide_model
from sevenfold.train import load_run_config, train

# A first step takes 2 s of a processor's time for these; none of them starts a thread.
import_module("torch._dynamo")
copies_over_gloo.stand_in()
cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()


def steps(folder: Path, rank: int, *names: str) -> None:
    """Take a step of every named case."""
    for case in (c for c in parallel_cases.CASES if c.name in names):
        layout = Layout.join(case.config, "cpu")
        model, optimizer = build(case, layout, torch.float32 if case.autocast else torch.float64)
        copies_over_gloo.MOVED.clear()
        found = take_step(case, model, optimizer, layout)
        found["num_copies"] = len(set(copies_over_gloo.MOVED))
        torch.save(found, folder / f"{case.name}.{rank}.pt")


def runs(folder: Path, rank: int, *run_files: str) -> None:
    """Train each run file in turn."""
    for run_file in run_files:
        train(load_run_config(Path(run_file)))


def failing(folder: Path, rank: int, *pairs: str) -> None:
    """Train a run file under each failure in turn, and write how it ended on this rank."""
    for failure, run_file in zip(pairs[::2], pairs[1::2], strict=True):
        config = load_run_config(Path(run_file))
        run = parallel_failures.Run(rank, config.run.out)
        ended: dict[str, object] = {"seen": run.seen, "error": None}
        try:
            with parallel_failures.FAILURES[failure](run):
                result = train(config)
            ended |= {"step": result.progress.step, "signal": result.signal_name}
        except SevenfoldError as error:
            ended["error"] = f"{type(error).__name__}: {error}"
        (folder / f"{Path(run_file).stem}.{rank}.json").write_text(json.dumps(ended))


def validation(folder: Path, rank: int) -> None:
    """Validate every case of parallel_validation.py."""
    for case in parallel_validation.CASES:
        layout = Layout.join(case.config, "cpu")
        found = parallel_validation.validated(case, layout, torch.float64)
        torch.save(found, folder / f"{case.name}.{rank}.pt")


def choosing(folder: Path, rank: int) -> None:
    """Take every case of parallel_choices.py through a layer of experts, both ways."""
    for case in (c for c in parallel_choices.CASES if c.num_ranks == dist.get_world_size()):
        found = parallel_choices.result_of_rank(case, Layout.join(case.config, "cpu"), rank)
        torch.save(found, folder / f"{case.name}.{rank}.pt")


def decoding(folder: Path, rank: int, layers: str) -> None:
    """Greedy tokens of the decoder on a divided mixture of experts."""
    model = parallel_generation.model_of(layers, True)
    divide_model(model, Layout.join(ParallelConfig(tensor=dist.get_world_size()), "cpu"))
    tokens = parallel_generation.by_decoder(model, 3)
    torch.save(tokens, folder / f"{layers}.{rank}.pt")


def generation(folder: Path, rank: int, layers: str) -> None:
    """Greedy tokens of the decoder and of the engine on a divided model."""
    layout = Layout.join(ParallelConfig(tensor=dist.get_world_size()), "cpu")
    for experts in (False, True):
        model = parallel_generation.model_of(layers, experts)
        divide_model(model, layout)
        tokens = parallel_generation.generate(model)
        torch.save(tokens, folder / f"{layers}-{experts}.{rank}.pt")


def serving(folder: Path, rank: int, layers: str) -> None:
    """Tokens of the engine on the first rank, which the others follow."""
    layout = Layout.join(ParallelConfig(tensor=dist.get_world_size()), "cpu")
    for experts in (False, True):
        model = parallel_generation.model_of(layers, experts)
        divide_model(model, layout)
        found = parallel_generation.serve(model, Channel())
        if rank == 0:
            torch.save(found, folder / f"{layers}-{experts}.pt")


def recorded(folder: Path, rank: int, layers: str) -> None:
    """As serving, of a crowd, through the runner that records steps on a GPU."""
    layout = Layout.join(ParallelConfig(tensor=dist.get_world_size()), "cpu")
    for experts in (False, True):
        model = parallel_generation.model_of(layers, experts)
        divide_model(model, layout)
        found = parallel_recorded.serve_recorded(model, Channel())
        torch.save(found, folder / f"{layers}-{experts}.{rank}.pt")


JOBS = {
    job.__name__: job
    for job in (steps, runs, failing, validation, choosing, decoding, generation, serving, recorded)
}


TIMEOUT_S = 280


def process(order: dict, rank: int) -> None:
    folder, num_ranks = Path(order["folder"]), order["ranks"]
    errors = (folder / "errors").open("a")
    os.dup2(errors.fileno(), 2)
    os.dup2(errors.fileno(), 1)
    torch.set_num_threads(1)
    store = dist.FileStore(order["store"], num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    try:
        JOBS[order["job"]](folder, rank, *order["arguments"])
    except BaseException:
        # The others wait in a collective that this rank will not join: run ends them.
        traceback.print_exc()
        sys.exit(1)
    dist.destroy_process_group()


def run(order: dict) -> bool:
    context = multiprocessing.get_context("fork")
    order["store"] = f"{order['folder']}/store-{time.monotonic_ns()}"
    ranks = [context.Process(target=process, args=(order, r)) for r in range(order["ranks"])]
    for rank in ranks:
        rank.start()
    until = time.monotonic() + TIMEOUT_S
    while any(rank.is_alive() for rank in ranks):
        for rank in ranks:
            rank.join(0.05)
        if any(rank.exitcode for rank in ranks) or time.monotonic() > until:
            for rank in ranks:
                rank.kill()
    return all(rank.exitcode == 0 for rank in ranks)


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write("done\n" if run(json.loads(line)) else "failed\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
