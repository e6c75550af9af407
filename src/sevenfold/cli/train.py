"""`sevenfold train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sevenfold.cli.train_plan import print_plan
from sevenfold.config import ConfigError
from sevenfold.train import RunConfig, TrainResult, load_run_config, train
from sevenfold.train.display import show_run
from sevenfold.train.recipe import (
    LONGEST_TOKENS,
    STAGE_TOKENS,
    long_context_stages,
    write_stages,
)

GpuGib = Annotated[
    float | None,
    typer.Option("--gpu-gib", min=0.0, help="With --dry-run: say whether a rank fits so many GiB."),
]
Longest = Annotated[
    int | None,
    typer.Option(
        help="With --stages: tokens of the last stage's rows.", show_default=f"{LONGEST_TOKENS}"
    ),
]
StageTokens = Annotated[
    int | None,
    typer.Option(help="With --stages: tokens of all stages.", show_default=f"{STAGE_TOKENS}"),
]


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
    gpu_gib: GpuGib = None,
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
    longest: Longest = None,
    stage_tokens: StageTokens = None,
    questions: Annotated[
        Path | None, typer.Option(help="With --stages: dataset of long questions and answers.")
    ] = None,
) -> None:
    """Train a model; the same command again goes on where the run stopped.

    With a [parallel] table, start it by torchrun: one process a rank.
    """
    console = Console()
    _check_together({"--dry-run": dry_run, "--plot": plot, "--stages": stages is not None})
    lengths = {"--longest": longest, "--stage-tokens": stage_tokens, "--questions": questions}
    _check_needed("--stages", stages is not None, lengths)
    _check_needed("--dry-run", dry_run, {"--gpu-gib": gpu_gib})
    if plot and run.is_dir():
        _plot(run, console)
        return
    config = load_run_config(run, set_ or [])
    if plot:
        _plot(config.run.out, console)
        return
    if stages is not None:
        sizes = {
            "longest_tokens": LONGEST_TOKENS if longest is None else longest,
            "stage_tokens": STAGE_TOKENS if stage_tokens is None else stage_tokens,
        }
        written = long_context_stages(config, questions=questions, **sizes)
        for path in write_stages(written, stages):
            console.print(f"written to {path}", highlight=False, soft_wrap=True)
        return
    if dry_run:
        print_plan(config, console, gpu_gib=gpu_gib)
        return
    with show_run(config, console) as show:
        result = train(config, on_step=show)
    if result.is_first:
        console.print(_ending(result, config, run), highlight=False, soft_wrap=True)


def _check_together(asked: dict[str, bool]) -> None:
    given = [name for name, is_asked in asked.items() if is_asked]
    if len(given) > 1:
        raise ConfigError(
            f"{' and '.join(given)} must not stand together, for each does one thing in place of "
            f"training; give one of them"
        )


def _check_needed(command: str, is_asked: bool, options: Mapping[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given and not is_asked:
        raise ConfigError(f"{', '.join(given)} must come with {command}, got none")


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
