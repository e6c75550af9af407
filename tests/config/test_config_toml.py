"""Reading TOML: extends, overrides, and what cannot be read."""

import re
from pathlib import Path

import pytest

from sevenfold.config import ConfigError, read_toml


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_plain_tables(tmp_path: Path) -> None:
    path = write(tmp_path, "run.toml", 'steps = 3\nname = "ä"\n[optimizer]\nlr = 1e-3\n')
    assert read_toml(path) == {"steps": 3, "name": "ä", "optimizer": {"lr": 1e-3}}


def test_extends_is_relative_to_its_file_and_chains(tmp_path: Path) -> None:
    write(tmp_path, "base/deep.toml", "a = 1\nb = 1\nc = 1\n[t]\nx = 1\ny = 1")
    write(tmp_path, "base/base.toml", 'extends = "deep.toml"\nb = 2\nc = 2\n[t]\ny = 2')
    path = write(tmp_path, "run.toml", 'extends = "base/base.toml"\nc = 3\n[t]\nz = 3')
    assert read_toml(path) == {"a": 1, "b": 2, "c": 3, "t": {"x": 1, "y": 2, "z": 3}}


@pytest.mark.parametrize("chain", [["a.toml"], ["b.toml", "a.toml"], ["b.toml", "./b.toml"]])
def test_extends_never_leads_back(tmp_path: Path, chain: list[str]) -> None:
    for name, base in zip(["a.toml", "b.toml"], chain, strict=False):
        write(tmp_path, name, f'extends = "{base}"')
    with pytest.raises(ConfigError, match="extends must not lead back to itself"):
        read_toml(tmp_path / "a.toml")


def test_extends_must_be_a_name(tmp_path: Path) -> None:
    path = write(tmp_path, "run.toml", "extends = 3")
    with pytest.raises(ConfigError, match=r"run\.toml: extends must be a file name, got 3"):
        read_toml(path)


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "run.toml", 'extends = "gone.toml"')
    message = f"{tmp_path / 'gone.toml'}: cannot be read: No such file or directory"
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_toml(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: cannot be read: No such file"):
        read_toml(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_toml(tmp_path)


@pytest.mark.parametrize("content", [b"steps = \n", b"a = 1\na = 2\n", b"name = '\xff'\n"])
def test_what_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml: must be TOML: "):
        read_toml(path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=5", {"steps": 5, "optimizer": {"lr": 0.1}}),
        (" steps = 5 ", {"steps": 5, "optimizer": {"lr": 0.1}}),
        ("optimizer.lr=3e-4", {"steps": 3, "optimizer": {"lr": 3e-4}}),
        (
            "optimizer.betas=[0.9, 0.95]",
            {"steps": 3, "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}},
        ),
        ("model.moe.top=2", {"steps": 3, "optimizer": {"lr": 0.1}, "model": {"moe": {"top": 2}}}),
        ("name=nano-hybrid", {"steps": 3, "optimizer": {"lr": 0.1}, "name": "nano-hybrid"}),
        ('name="5"', {"steps": 3, "optimizer": {"lr": 0.1}, "name": "5"}),
        ("name=a=b", {"steps": 3, "optimizer": {"lr": 0.1}, "name": "a=b"}),
        ("flag=true", {"steps": 3, "optimizer": {"lr": 0.1}, "flag": True}),
        ("name=", {"steps": 3, "optimizer": {"lr": 0.1}, "name": ""}),
        ('optimizer={kind="sgd"}', {"steps": 3, "optimizer": {"kind": "sgd"}}),
    ],
)
def test_overrides(tmp_path: Path, override: str, expected: dict) -> None:
    path = write(tmp_path, "run.toml", "steps = 3\n[optimizer]\nlr = 0.1\n")
    assert read_toml(path, [override]) == expected


def test_later_overrides_win_and_reach_the_base(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", "[t]\nx = 1\ny = 1")
    path = write(tmp_path, "run.toml", 'extends = "base.toml"')
    assert read_toml(path, ["t.x=2", "t.x=3"]) == {"t": {"x": 3, "y": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "--set must read key=value, got 'steps'"),
        ("=5", "--set must read key=value, got '=5'"),
        ("a..b=5", "--set must read key=value, got 'a..b=5'"),
        ("a.=5", "--set must read key=value, got 'a.=5'"),
        ("steps.lr=5", "--set steps.lr: steps must be a table, got 3"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "run.toml", "steps = 3")
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_toml(path, [override])
