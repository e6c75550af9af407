"""`sevenfold data`: text to a tokenizer and token shards."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sevenfold.config import parse_config
from sevenfold.data import PrepareConfig, prepare, progress_bar

data_app = typer.Typer(no_args_is_help=True, help="Prepare training data.")


@data_app.callback()
def _group() -> None:
    """Prepare training data."""


@data_app.command("prepare")
def prepare_command(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SRC...", help="Text, JSONL or Parquet files, or folders of them."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer to train.")] = 8192,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json to use instead of training one.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Key or column with the text.")] = "text",
    split_documents_bytes: Annotated[
        int | None, typer.Option(help="Cut plain text at paragraphs into documents of this size.")
    ] = None,
    dedup: Annotated[str | None, typer.Option(help="exact or minhash.")] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents that is held out.")
    ] = 0.05,
    on_bad_utf8: Annotated[str, typer.Option(help="error or replace.")] = "error",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
) -> None:
    """Turn text into a tokenizer and token shards; the same command again does nothing."""
    values: dict[str, Any] = {
        "sources": [str(source) for source in sources],
        "out": str(out),
        "vocab_size": vocab_size,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "text_field": text_field,
        "split_documents_bytes": split_documents_bytes,
        "dedup": dedup,
        "validation_fraction": validation_fraction,
        "on_bad_utf8": on_bad_utf8,
        "overwrite": overwrite,
    }
    console = Console()
    with progress_bar(console) as progress:
        manifest = prepare(parse_config(PrepareConfig, values, "data prepare"), progress)
    for name, split in manifest.splits.items():
        console.print(
            f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, "
            f"{split.num_bytes:,} bytes of text",
            highlight=False,
        )
    console.print(f"written to {out}", highlight=False, soft_wrap=True)
