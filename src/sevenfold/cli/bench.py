"""`sevenfold bench`: speed against peers and against the machine's floor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sevenfold.bench.cpu import run_cpu_benchmark
from sevenfold.bench.kernels.command import Request, run_kernel_benchmark
from sevenfold.bench.precision import run_precision_benchmark
from sevenfold.bench.precision_states import run_state_benchmark
from sevenfold.bench.record import write_record

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed against peers.")


@bench_app.callback()
def _group() -> None:
    """Measure speed against peers."""


@bench_app.command("cpu")
def cpu_command(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path(
        "benchmarks/results/cpu.json"
    ),
) -> None:
    """Compare with transformers' MiniMax on this CPU: forward, decoding, training, memory."""
    console = Console()

    def report(row: Mapping[str, Any]) -> None:
        console.print(
            f"{row['case']:>24}: ours {row['ours_s']:.3f} s, transformers "
            f"{row['transformers_s']:.3f} s, ratio {row['ratio']:.2f} (target "
            f"{row['target_ratio']}), floor {row['floor_s']:.3f} s; memory "
            f"{row['ours_peak_bytes'] / 1e6:.0f} against "
            f"{row['transformers_peak_bytes'] / 1e6:.0f} MB",
            highlight=False,
            soft_wrap=True,
        )

    rows = run_cpu_benchmark(report)
    write_record(out, "sevenfold bench cpu", rows)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)


@bench_app.command("kernels")
def kernels_command(
    cases: Annotated[
        list[str] | None, typer.Option(help="Groups of cases; may be given again. Default: all.")
    ] = None,
    sides: Annotated[
        list[str] | None, typer.Option(help="Sides to run; may be given again. Default: all.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file; default: the GPU's in benchmarks/results/kernels/."),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record where the code is a copy without git.")
    ] = None,
) -> None:
    """Compare the kernels with every installed peer and the floor, on this GPU."""
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    run_kernel_benchmark(Request(cases or (), sides or (), out, commit), say)


@bench_app.command("precision")
def precision_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path(
        "benchmarks/results/precision/demo-hybrid.json"
    ),
) -> None:
    """Measure what fewer bits of snapshots, states and weights change, against fp32."""
    console = Console()

    def report(row: Mapping[str, Any]) -> None:
        figures = ", ".join(f"{name} {x:.3g}" for name, x in row.items() if name != "case")
        console.print(f"{row['case']:>32}: {figures}", highlight=False, soft_wrap=True)

    rows = run_precision_benchmark(checkpoint, report)
    for row in run_state_benchmark():
        report(row)
        rows.append(row)
    write_record(out, "sevenfold bench precision CKPT", rows)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)
