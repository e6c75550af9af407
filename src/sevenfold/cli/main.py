"""The `sevenfold` program and its exit codes: 0 done, 1 failed, 2 bad usage or configuration."""

import os
import sys
from collections import UserDict
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from sevenfold.config import ConfigError, SevenfoldError

# Name of a command: its module in this package, and what it is called there.
COMMANDS = {
    "demo": ("demo", "demo_command"),
    "data": ("data", "data_app"),
    "train": ("train", "train_command"),
    "generate": ("generate", "generate_command"),
    "serve": ("serve", "serve_command"),
    "inspect": ("inspect", "inspect_command"),
    "convert": ("convert", "convert_command"),
    "bench": ("bench", "bench_app"),
}


class _Imported(UserDict):
    """Commands, imported when they are looked up: serving does not wait for what training needs."""

    def __getitem__(self, name: str) -> Any:
        module, attribute = self.data[name]
        found = getattr(import_module(f"sevenfold.cli.{module}"), attribute)
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(add_completion=False)
            alone.command(name)(found)
            found = alone
        command = get_command(found)
        command.name = name
        return command


class _Program(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Imported(COMMANDS)


app = typer.Typer(
    cls=_Program,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _program() -> None:
    """Train, evaluate and serve hybrid linear-attention language models."""


def main() -> None:
    """Run the program; an error made on purpose becomes one line, any other keeps its trace."""
    try:
        app()
    except ConfigError as error:
        sys.exit(_report(error, 2))
    except (SevenfoldError, OSError) as error:
        code = _report(error, 1)
        _drop_output()
        sys.exit(code)


def _report(error: Exception, code: int) -> int:
    typer.echo(f"sevenfold: {error}", err=True)
    return code


def _drop_output() -> None:
    """Forget what cannot be written: the interpreter would try again, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
