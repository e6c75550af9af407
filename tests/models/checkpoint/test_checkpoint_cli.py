"""`sevenfold convert`, registered as the program registers it."""

from pathlib import Path

import pytest
import typer
from checkpoint_helpers import random_model, tiny_config
from typer.testing import CliRunner

from sevenfold.cli.convert import convert_command
from sevenfold.config import CheckpointError
from sevenfold.models.checkpoint import detect_format, save_model

app = typer.Typer()
app.command("convert")(convert_command)


def test_it_converts_and_says_so(tmp_path: Path) -> None:
    src, dst = tmp_path / "a", tmp_path / "b"
    save_model(random_model(tiny_config()), src)
    done = CliRunner().invoke(app, [str(src), str(dst), "--to", "hf"])
    assert (done.exit_code, done.stdout) == (0, f"{src} (sevenfold) -> {dst} (hf)\n")
    assert detect_format(dst) == "hf"
    refused = CliRunner().invoke(app, [str(src), str(dst), "--to", "minimax"])
    assert isinstance(refused.exception, CheckpointError)
    done = CliRunner().invoke(app, [str(src), str(dst), "--to", "minimax", "--overwrite"])
    assert done.exit_code == 0
    assert detect_format(dst) == "minimax"


@pytest.mark.parametrize("arguments", [["a", "b"], ["a", "b", "--to", "gguf"], ["--to", "hf"]])
def test_bad_usage(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2
