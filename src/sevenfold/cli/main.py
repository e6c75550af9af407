"""The `sevenfold` program and its exit codes: 0 done, 1 failed, 2 bad usage or configuration."""

import os
import sys

import typer

from sevenfold.cli.bench import bench_app
from sevenfold.cli.convert import convert_command
from sevenfold.cli.data import data_app
from sevenfold.cli.demo import demo_command
from sevenfold.cli.generate import generate_command
from sevenfold.cli.inspect import inspect_command
from sevenfold.cli.serve import serve_command
from sevenfold.cli.train import train_command
from sevenfold.config import ConfigError, SevenfoldError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, evaluate and serve hybrid linear-attention language models.",
)
app.command("demo")(demo_command)
app.add_typer(data_app, name="data")
app.command("train")(train_command)
app.command("generate")(generate_command)
app.command("serve")(serve_command)
app.command("inspect")(inspect_command)
app.command("convert")(convert_command)
app.add_typer(bench_app, name="bench")


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
