"""Runs a job in several processes over gloo; they are forked, so the imports are paid once.

python parallel_worker.py JOB RANKS FOLDER [ARGUMENT...]
"""

import multiprocessing
import sys
import traceback
from pathlib import Path

import parallel_cases
import parallel_generation
import torch
from parallel_helpers import build, take_step
from torch import distributed as dist

from sevenfold.engine.tensor_parallel import Channel
from sevenfold.parallel import Layout, ParallelConfig, divide_model
from sevenfold.train import load_run_config, train


def steps(folder: Path, rank: int, *names: str) -> None:
    """Take a step of every named case."""
    for case in (c for c in parallel_cases.CASES if c.name in names):
        layout = Layout.join(case.config, "cpu")
        model, optimizer = build(case, layout, torch.float32 if case.autocast else torch.float64)
        torch.save(take_step(case, model, optimizer, layout), folder / f"{case.name}.{rank}.pt")


def runs(folder: Path, rank: int, *run_files: str) -> None:
    """Train each run file in turn."""
    for run_file in run_files:
        train(load_run_config(Path(run_file)))


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


JOBS = {job.__name__: job for job in (steps, runs, decoding, generation, serving)}


def process(job: str, rank: int, num_ranks: int, folder: Path, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    try:
        JOBS[job](folder, rank, *arguments)
    except BaseException:
        # The others wait in a collective that this rank will not join: main ends them.
        traceback.print_exc()
        sys.exit(1)
    dist.destroy_process_group()


def main() -> None:
    job, num_ranks, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=process, args=(job, rank, num_ranks, folder, sys.argv[4:]))
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks):
        for rank in ranks:
            rank.join(0.05)
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()
            sys.exit("a rank failed")
    sys.exit(max(rank.exitcode or 0 for rank in ranks))


if __name__ == "__main__":
    main()
