"""Trains in forked children and kills them at the moments that the command line lists.

A child shares the imports of this process, which has run no tensor operation, so a start is quick.
    python kill_worker.py RUN.toml MOMENT...
A moment is `line:N:S` (S seconds after line N of metrics.jsonl), `saving` (as a checkpoint's folder
begins), `metadata` (as its last file appears, just before the rename) or `removing` (as an old
checkpoint goes). The last child ends the run.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from numba.core.registry import cpu_target

from sevenfold.train import load_run_config, train

# A first step takes 2 s of a processor's time for these; none of them starts a thread.
import_module("torch._dynamo")
cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()


def child(run_file: str) -> None:
    train(load_run_config(Path(run_file)))


def line_written(metrics: Path, number: int, delay_s: float) -> bool:
    if not metrics.exists() or metrics.read_bytes().count(b"\n") < number:
        return False
    time.sleep(delay_s)
    return True


def moment_of(name: str, out: Path) -> Callable[[], bool]:
    kind, *values = name.split(":")
    metrics, checkpoints = out / "metrics.jsonl", out / "checkpoints"
    if kind == "line":
        return partial(line_written, metrics, int(values[0]), float(values[1]))
    if kind == "saving":
        return lambda: any(checkpoints.glob(".step-*.tmp"))
    if kind == "metadata":
        return lambda: any(checkpoints.glob(".step-*.tmp/.metadata*"))
    seen: set[str] = set()

    def removed() -> bool:
        there = {path.name for path in checkpoints.glob("step-*")}
        seen.update(there)
        return seen != there

    return removed


def report(moment: str, exit_code: int | None) -> None:
    sys.stdout.write(f"{moment} {exit_code}\n")
    sys.stdout.flush()


def main(run_file: str, moments: list[str]) -> None:
    out = load_run_config(Path(run_file)).run.out
    fork = multiprocessing.get_context("fork")
    for name in moments:
        process = fork.Process(target=child, args=(run_file,))
        reached = moment_of(name, out)
        process.start()
        while process.is_alive() and not reached():
            time.sleep(0.001)
        process.kill()
        process.join()
        report(name, process.exitcode)
    last = fork.Process(target=child, args=(run_file,))
    last.start()
    last.join()
    report("end", last.exitcode)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
