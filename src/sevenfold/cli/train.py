"""`sevenfold train`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sevenfold.cli.train_plan import print_plan
from sevenfold.train import RunConfig, TrainResult, load_run_config, train
from sevenfold.train.display import show_run
from sevenfold.train.recipe import (
    LONGEST_TOKENS,
    STAGE_TOKENS,
    long_context_stages,
    write_stages,
)


def train_command(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in optimizer.lr=3e-4."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print mesh, memory and time of a rank; train nothing."),
    ] = False,
    plot: Annotated[
        bool,
        typer.Option(
            "--plot", help="Draw RUN's metrics.jsonl, a run file's or a folder's; train nothing."
        ),
    ] = False,
    stages: Annotated[
        Path | None,
        typer.Option(
            help="Write the run files of long context that follow this run; train nothing."
        ),
    ] = None,
    longest: Annotated[
        int, typer.Option(help="With --stages: tokens of the last stage's rows.")
    ] = LONGEST_TOKENS,
    stage_tokens: Annotated[
        int, typer.Option(help="With --stages: tokens of all stages.")
    ] = STAGE_TOKENS,
    questions: Annotated[
        Path | None, typer.Option(help="With --stages: dataset of long questions and answers.")
    ] = None,
) -> None:
    """Train a model; the same command again goes on where the run stopped.

    With a [parallel] table, start it by torchrun: one process a rank.
    """
    console = Console()
    if plot and run.is_dir():
        _plot(run, console)
        return
    config = load_run_config(run, set_ or [])
    if plot:
        _plot(config.run.out, console)
        return
    if stages is not None:
        lengths = {"longest_tokens": longest, "stage_tokens": stage_tokens}
        written = long_context_stages(config, **lengths, questions=questions)
        for path in write_stages(written, stages):
            console.print(f"written to {path}", highlight=False, soft_wrap=True)
        return
    if dry_run:
        print_plan(config, console)
        return
    with show_run(config, console) as show:
        result = train(config, on_step=show)
    if not result.is_first:
        return
    console.print(_ending(result, config, run), highlight=False, soft_wrap=True)


def _plot(run: Path, console: Console) -> None:
    # Here, and not above: no other command should wait for matplotlib.
    from sevenfold.train.plot import plot_run

    console.print(f"drawn in {plot_run(run)}", highlight=False, soft_wrap=True)


def _ending(result: TrainResult, config: RunConfig, run: Path) -> str:
    steps = config.run.steps
    if result.final is None:
        signal = result.signal_name or "a signal to another rank"
        return (
            f"Stopped by {signal} after step {result.progress.step} of {steps}; all is "
            f"saved in {result.folder}. The same command goes on: sevenfold train {run}"
        )
    if result.resumed_step == steps:
        return f"The run is complete: {steps} steps, model in {result.final}"
    return f"Done: {steps} steps, model in {result.final}"
