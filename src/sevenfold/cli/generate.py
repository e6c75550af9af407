"""`sevenfold generate`: a prompt's continuation, as it comes."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from sevenfold.config import parse_config
from sevenfold.engine import LLM, SamplingParams
from sevenfold.engine.precision import Precision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def generate_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the most probable share.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least share of the best token.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="1 changes nothing.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the output; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the output reproducible.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="int8 or fp8; with -experts only those: quantised on load.")
    ] = None,
) -> None:
    """Print the prompt's continuation as it is generated."""
    values = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or [],
        "seed": seed,
    }
    params = parse_config(SamplingParams, values, "generate")
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    options = parse_config(Precision, {"weights": weights}, "generate")
    found = None if dtype is None else DTYPES[dtype]
    llm = LLM(checkpoint, device=device, dtype=found, weights=options.weights, warm_up=False)
    try:
        deltas = llm.stream(prompt, params)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(prompt, nl=False)
    for delta in deltas:
        typer.echo(delta.text, nl=False)
    typer.echo()
