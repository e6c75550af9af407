"""Every code block of the README and the documentation is run or checked."""

import re
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from sevenfold.train import load_run_config

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<skip><!-- not run: [^\n]+ -->\n+)?^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
MAX_SKIPPED = 4


@dataclass(frozen=True)
class Block:
    """One fenced code block; line is that of its first line of code in the page."""

    language: str
    code: str
    line: int
    skipped: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            language=found["language"],
            code=found["code"],
            line=text.count("\n", 0, found.start("code")) + 1,
            skipped=found["skip"] is not None,
        )
        for found in FENCE.finditer(text)
    ]


def pages_with(language: str) -> list[Any]:
    return [
        pytest.param(page, id=page.name)
        for page in PAGES
        if any(block.language == language and not block.skipped for block in blocks(page))
    ]


def typed_commands(code: str) -> list[list[str]]:
    """The words of each command that a console block shows after its `$`."""
    joined = code.replace("\\\n", " ")
    lines = [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
    parts = [part for line in lines for part in re.split(r"&&|[|;<>]", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def unknown_words(command: Any, words: list[str]) -> list[str]:
    """Words of a `sevenfold` command line that name no subcommand and no option."""
    while getattr(command, "commands", None):
        if not words or words[0].startswith("-"):
            break
        if words[0] not in command.commands:
            return [words[0]]
        command, words = command.commands[words[0]], words[1:]
    known = {"--help"}
    for parameter in command.params:
        known.update(parameter.opts, parameter.secondary_opts)
    return [word for word in words if word.startswith("-") and word.split("=")[0] not in known]


def make_targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(page):
        if block.language == "python" and not block.skipped:
            # Padding makes a traceback name the line of the page.
            source = "\n" * (block.line - 1) + block.code
            exec(compile(source, str(page), "exec"), namespace)
            ran += 1
    assert ran > 0


@pytest.mark.parametrize("page", pages_with("console"))
def test_commands_exist(page: Path) -> None:
    commands = [
        words
        for block in blocks(page)
        if block.language == "console" and not block.skipped
        for words in typed_commands(block.code)
    ]
    assert commands, "a console block must show commands after `$ `"
    unknown_targets = [
        words
        for words in commands
        if words[0] == "make" and not {w for w in words[1:] if "=" not in w} <= make_targets()
    ]
    assert unknown_targets == []
    ours = [words[1:] for words in commands if words[0] == "sevenfold"]
    if not ours:
        return
    program = typer.main.get_command(import_module("sevenfold.cli.main").app)
    assert [(words, bad) for words in ours if (bad := unknown_words(program, words))] == []


@pytest.mark.parametrize("page", pages_with("toml"))
def test_run_files_are_valid(page: Path, tmp_path: Path) -> None:
    whole = [b.code for b in blocks(page) if b.language == "toml" and b.code.startswith("[run]")]
    assert whole, "a page with TOML must show a whole run file, from its [run] table on"
    for number, code in enumerate(whole):
        path = tmp_path / f"{number}.toml"
        path.write_text(code)
        assert load_run_config(path).run.steps > 0


def test_few_blocks_are_skipped() -> None:
    skipped = [f"{page.name}:{b.line}" for page in PAGES for b in blocks(page) if b.skipped]
    assert len(skipped) <= MAX_SKIPPED, skipped


def test_a_misspelt_option_and_subcommand_are_seen() -> None:
    app = typer.Typer()

    @app.command()
    def train(run: str, steps: int = 1) -> None:
        """Train."""

    @app.command()
    def serve(path: str) -> None:
        """Serve."""

    program = typer.main.get_command(app)
    assert unknown_words(program, ["train", "run.toml", "--steps", "3"]) == []
    assert unknown_words(program, ["train", "run.toml", "--step=3"]) == ["--step=3"]
    assert unknown_words(program, ["trian"]) == ["trian"]
    assert typed_commands("$ sevenfold train \\\n  a.toml | tee log  # note\nout\n") == [
        ["sevenfold", "train", "a.toml"],
        ["tee", "log"],
    ]
