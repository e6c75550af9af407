"""`sevenfold bench train`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from sevenfold.bench.record import device_name
from sevenfold.config import SevenfoldError, UnsupportedError

_RESULTS = Path("benchmarks/results/train")


def train_command(
    group: Annotated[
        list[str] | None,
        typer.Option(help="step, mfu, context or longest; may be given again. Default: all."),
    ] = None,
    side: Annotated[
        list[str] | None,
        typer.Option(help="sevenfold or transformers; may be given again. Default: both."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Part of a case's name, as '1 x 32,768'; may be given again."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Small models and a 64th of the tokens, for a CPU.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file; default: the device's in benchmarks/results/train/."),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record where the code is a copy without git.")
    ] = None,
) -> None:
    """Time training steps beside transformers, the floor and a softmax twin.

    Every case runs in a process of its own; its rows join those that the file holds, so that a
    benchmark can be run in parts.
    """
    # Here, and not above: the other benchmarks should not wait for what training needs.
    from sevenfold.bench.training.cases import cases_of
    from sevenfold.bench.training.run import run_cases, write_rows
    from sevenfold.bench.training.table import progress_line, summary

    cases = cases_of(group or (), side or (), only or (), tiny=tiny)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            "device must be present, got cuda without a CUDA device; --device cpu --tiny runs "
            "without"
        )
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    path = out or _default_path(device)

    def report(row: Mapping[str, Any]) -> None:
        say(progress_line(row))
        # At once: a run that is cut off loses none.
        write_rows(path, [row], device, commit)

    rows = run_cases(cases, device, report)
    for line in (*summary(write_rows(path, rows, device, commit)), f"written to {path}"):
        say(line)
    failed = [f"{row['case']} ({row['side']})" for row in rows if row["status"] != "ok"]
    if failed:
        raise SevenfoldError(f"every case must run, got failures of {', '.join(failed)}; see above")


def _default_path(device: str) -> Path:
    name = re.sub("[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return _RESULTS / f"{name}.json"
