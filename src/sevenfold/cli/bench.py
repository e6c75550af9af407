"""`sevenfold bench`: speed against peers and against the machine's floor."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from sevenfold.bench.cpu import run_cpu_benchmark
from sevenfold.bench.kernels.command import Request, run_kernel_benchmark
from sevenfold.bench.precision import run_precision_benchmark
from sevenfold.bench.precision_states import run_state_benchmark
from sevenfold.bench.record import write_record
from sevenfold.cli.bench_train import train_command
from sevenfold.engine.heap import freeze_heap

if TYPE_CHECKING:
    from sevenfold.bench.serving.sides import Sides

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SERVING = Path("benchmarks/results/serving")

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


Preset = Annotated[str, typer.Option(help="Which model, with random weights.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU, else bfloat16."),
]
PeerMost = Annotated[int, typer.Option(help="Longer prompts are left to our side alone.")]
TwinMost = Annotated[int, typer.Option(help="Longer prompts are not given to the softmax twin.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed runs of each side; medians.")]


@bench_app.command("prefill")
def prefill_command(
    context: typer.Context,
    preset: Preset = "bench-19m",
    device: Device = "cpu",
    dtype: Dtype = None,
    lengths: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens; may be given again.")
    ] = None,
    peer_most_tokens: PeerMost = 131_072,
    twin_most_tokens: TwinMost = 262_144,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = _SERVING / "prefill.json",
) -> None:
    """Compare the first token's time after long prompts with transformers and a softmax twin."""
    from sevenfold.bench.serving.prefill import run_prefill

    sides, checked = _sides(preset, device, dtype)
    limits = {"peer_most_tokens": peer_most_tokens, "twin_most_tokens": twin_most_tokens}
    limits["repeats"] = repeats
    with _Record(out, _given(context), checked) as record:
        run_prefill(sides, lengths or [8192, 131_072], **limits, report=record)


@bench_app.command("decode")
def decode_command(
    context: typer.Context,
    preset: Preset = "bench-19m",
    device: Device = "cpu",
    dtype: Dtype = None,
    batches: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests side by side; may be given again.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each request.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=3, help="Of each request.")] = 64,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = _SERVING / "decode.json",
) -> None:
    """Compare decoding steps of some batches with transformers' own loop."""
    from sevenfold.bench.serving.decode import run_decode

    sides, checked = _sides(preset, device, dtype)
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    with _Record(out, _given(context), checked) as record:
        run_decode(sides, batches or [1, 64], **sizes, report=record)


@bench_app.command("serve")
def serve_command(
    context: typer.Context,
    preset: Preset = "bench-19m",
    device: Device = "cpu",
    dtype: Dtype = None,
    lengths: Annotated[
        list[int] | None, typer.Option(min=64, help="Tokens of a first turn; may be given again.")
    ] = None,
    peer_most_tokens: PeerMost = 131_072,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = _SERVING / "serve.json",
) -> None:
    """Compare the second turn of a long chat with computing all of it, and weigh a request."""
    from sevenfold.bench.serving.second_turn import run_second_turn

    sides, checked = _sides(preset, device, dtype)
    limits = {"peer_most_tokens": peer_most_tokens, "repeats": repeats}
    with _Record(out, _given(context), checked) as record:
        run_second_turn(sides, lengths or [32_768], **limits, report=record)


@bench_app.command("speculate")
def speculate_command(
    context: typer.Context,
    preset: Preset = "bench-19m",
    device: Device = "cpu",
    dtype: Dtype = None,
    prompt_tokens: Annotated[int, typer.Option(min=32, help="Of each request.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=3, help="Of each request.")] = 512,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = _SERVING / "speculate.json",
) -> None:
    """Compare decoding by guesses with plain decoding, on text that copies itself and hostile."""
    from sevenfold.bench.serving.speculation import run_speculation

    sides, checked = _sides(preset, device, dtype)
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    with _Record(out, _given(context), checked) as record:
        run_speculation(sides, **sizes, report=record)


def _given(context: typer.Context) -> str:
    """The command that was given, as its record tells it."""
    words = ["sevenfold", "bench", str(context.info_name)]
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name == "out" or source is None or source.name != "COMMANDLINE":
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [f"--{name.replace('_', '-')}", str(one)]
    return shlex.join(words)


def _sides(preset: str, device: str, dtype: str | None) -> "tuple[Sides, dict[str, Any]]":
    """Both sides, and what checking them gave."""
    from sevenfold.bench.serving.agreement import check_sides
    from sevenfold.bench.serving.sides import build_sides

    name = dtype or ("float32" if device == "cpu" else "bfloat16")
    if name not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    sides = build_sides(preset, device, DTYPES[name])
    rates = {
        "dtype": name,
        "device": sides.device,
        "matmul_flops_per_s": sides.rates.flops_per_s,
        "read_bytes_per_s": sides.rates.bytes_per_s,
    }
    checked = check_sides(sides)
    freeze_heap()  # of both sides: neither shall wait for a walk through the other's objects
    return sides, checked | rates


class _Record:
    """Says each row when it is done, and writes those so far: a run that is cut off loses none."""

    def __init__(self, out: Path, command: str, checked: Mapping[str, Any]) -> None:
        self._out, self._command, self._device = out, command, checked["device"]
        self._same = {name: value for name, value in checked.items() if name != "device"}
        self._cases: list[dict[str, Any]] = []
        self._console = Console()

    def __enter__(self) -> "_Record":
        return self

    def __call__(self, row: Mapping[str, Any]) -> None:
        shown = {k: f"{v:,.4g}" if isinstance(v, float) else v for k, v in row.items()}
        self._say(", ".join(f"{key} {value}" for key, value in shown.items()))
        self._cases.append({**row, **self._same})
        write_record(self._out, self._command, self._cases, device=self._device)

    def __exit__(self, *_: object) -> None:
        if self._cases:
            self._say(f"written to {self._out}")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


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


bench_app.command("train")(train_command)
