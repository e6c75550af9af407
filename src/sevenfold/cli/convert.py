"""`sevenfold convert`: a checkpoint in another format."""

from pathlib import Path
from typing import Annotated

import typer

from sevenfold.models.checkpoint import CheckpointFormat, convert, detect_format

Source = Annotated[Path, typer.Argument(help="Checkpoint folder, of any of the three formats.")]
Target = Annotated[Path, typer.Argument(help="Folder to write.")]
To = Annotated[
    CheckpointFormat,
    typer.Option(help="Ours, transformers' minimax, or the original MiniMax schema."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at DST.")]


def convert_command(src: Source, dst: Target, to: To, overwrite: Overwrite = False) -> None:
    """Write a checkpoint in another format, bit for bit."""
    convert(src, dst, to=to, overwrite=overwrite)
    typer.echo(f"{src} ({detect_format(src)}) -> {dst} ({to})")
