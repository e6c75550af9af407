"""Running the program in this process, and what a tiny run leaves."""

import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sevenfold.cli.main import app, main


def run_cli(*arguments: str | Path, columns: int = 200) -> Result:
    # Rich asks for the terminal's width.
    environment = {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(one) for one in arguments], env=environment)


def exit_code(*arguments: str | Path) -> int | str | None:
    """What the whole program exits with, errors made into lines."""
    argv = ["sevenfold", *(str(one) for one in arguments)]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@dataclass(frozen=True)
class TinyRun:
    """What `data prepare` and `train` said, and where their results lie."""

    prepared: Result
    trained: Result
    data: Path
    run_file: Path
    folder: Path
    checkpoint: Path
