"""A save that is interrupted leaves the old checkpoint or none, and no litter for long."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import contents, random_model, tiny_config

from sevenfold.config import CheckpointError
from sevenfold.models import HybridModel
from sevenfold.models.checkpoint import convert, folder, load_model, save_model, writer

# Forks processes that save a model. Each kills itself the moment the n-th call of an os function of
# the save comes; how it ended is said.
KILLED_SAVES = f"""
import json, os, signal, sys, tempfile
from pathlib import Path
import torch
torch.set_num_threads(1)  # a forked process has no others
sys.path.insert(0, {str(Path(__file__).parent)!r})
from checkpoint_helpers import random_model, tiny_config
from sevenfold.models.checkpoint import save_model

def killing(function, left):
    def call(*args, **options):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

model = random_model(tiny_config(mlp_alpha_factor=2.0))
with tempfile.TemporaryDirectory() as folder:
    save_model(model, folder)  # imports what a first save does
for line in sys.stdin:
    function, call, path = json.loads(line)
    if os.fork() == 0:
        if function == "fsync":
            os.fsync = killing(os.fsync, call)
        else:
            Path.rename = killing(Path.rename, call)
        save_model(model, path, overwrite=True, max_shard_bytes=20_000)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
Kill = Callable[[Path, str, int], None]


@pytest.fixture(scope="module")
def killed_save() -> Iterator[Kill]:
    """A save of another model, killed at the n-th call of fsync or rename."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", KILLED_SAVES], text=True, **pipes) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def save(path: Path, function: str, call: int) -> None:
            stdin.write(json.dumps([function, call, str(path)]) + "\n")
            stdin.flush()
            assert stdout.readline() == f"{-signal.SIGKILL}\n"

        yield save
        process.kill()


@pytest.fixture
def old() -> HybridModel:
    return random_model(tiny_config())


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_kill_amid_the_first_save_leaves_no_folder(
    tmp_path: Path, old: HybridModel, killed_save: Kill
) -> None:
    killed_save(tmp_path / "a", "fsync", call=3)
    (staging,) = names(tmp_path)
    assert staging.startswith(".a.partial-")
    assert any((tmp_path / staging).glob("*.safetensors"))
    save_model(old, tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert load_model(tmp_path / "a").config == old.config


def test_a_kill_amid_a_later_save_leaves_the_old_one(
    tmp_path: Path, old: HybridModel, killed_save: Kill
) -> None:
    save_model(old, tmp_path / "a")
    before = contents(tmp_path / "a")
    killed_save(tmp_path / "a", "fsync", call=3)
    assert contents(tmp_path / "a") == before
    save_model(old, tmp_path / "a", overwrite=True)
    assert names(tmp_path) == ["a"]
    assert contents(tmp_path / "a") == before


def test_a_kill_between_the_renames_loses_neither(
    tmp_path: Path, old: HybridModel, killed_save: Kill
) -> None:
    save_model(old, tmp_path / "a")
    before = contents(tmp_path / "a")
    killed_save(tmp_path / "a", "rename", call=2)
    with pytest.raises(CheckpointError, match=r"a/config.json must be readable"):
        load_model(tmp_path / "a")
    # The next save first brings the old one back, and so refuses to write over it unasked.
    with pytest.raises(CheckpointError, match=r"a must be new, got an existing checkpoint; pass"):
        save_model(old, tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert contents(tmp_path / "a") == before


def test_a_kill_before_the_old_one_is_deleted_keeps_the_new(tmp_path: Path, old) -> None:
    save_model(old, tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / ".a.replaced-00000000")
    save_model(random_model(tiny_config(mlp_alpha_factor=2.0)), tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / "a")
    save_model(old, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"must be new, got an existing checkpoint"):
        save_model(old, tmp_path / "a")
    assert names(tmp_path) == ["a", "b"]
    assert load_model(tmp_path / "a").config.mlp_alpha_factor == 2.0


def test_a_save_in_progress_is_not_cleared_away(tmp_path: Path, old: HybridModel) -> None:
    with folder.staged_folder(tmp_path / "a", 0, overwrite=False) as staging:
        (staging / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"a must be writable"):
            raise_while_saving(old, tmp_path / "a")
        assert (staging / "config.json").is_file()
    assert names(tmp_path) == ["a"]


def raise_while_saving(model: HybridModel, path: Path) -> None:
    """Another save of the same name, which fails for a reason of its own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer, "_write_file", raising(errno.EIO))
        save_model(model, path)


def raising(code: int):
    def call(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(tmp_path: Path, old: HybridModel, monkeypatch, exists: bool) -> None:
    if exists:
        save_model(old, tmp_path / "a")
    need = f"{4 * sum(p.numel() for p in old.parameters()):,}"
    monkeypatch.setattr(writer, "_bytes", raising(errno.ENOSPC))
    message = rf"a: the disk must have {need} bytes free for the checkpoint, got: No space left"
    with pytest.raises(CheckpointError, match=message):
        save_model(old, tmp_path / "a", overwrite=True)
    assert names(tmp_path) == (["a"] if exists else [])


def test_an_interrupt_leaves_nothing(tmp_path: Path, old: HybridModel, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_write_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(old, tmp_path / "a")
    assert names(tmp_path) == []


def test_an_existing_checkpoint_is_replaced_on_request_only(tmp_path: Path, old) -> None:
    save_model(old, tmp_path / "a")
    new = random_model(tiny_config(), torch.bfloat16)
    for call in (
        lambda: save_model(new, tmp_path / "a"),
        lambda: convert(tmp_path / "b", tmp_path / "a", to="hf"),
    ):
        save_model(new, tmp_path / "b", overwrite=True)
        with pytest.raises(CheckpointError, match=r"a must be new, got an existing checkpoint"):
            call()
    assert load_model(tmp_path / "a").dtype == torch.float32
    convert(tmp_path / "b", tmp_path / "a", to="hf", overwrite=True)
    assert load_model(tmp_path / "a").dtype == torch.bfloat16
    assert names(tmp_path) == ["a", "b"]


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path, old: HybridModel) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_text("text")
    for name in ("photos", "file"):
        message = rf"{name} must be new, empty or an earlier checkpoint, got something without"
        with pytest.raises(CheckpointError, match=message):
            save_model(old, tmp_path / name, overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    (tmp_path / "empty").mkdir()
    save_model(old, tmp_path / "empty")
    assert load_model(tmp_path / "empty").config == old.config


def test_a_path_that_cannot_be_written(tmp_path: Path, old: HybridModel) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match=r"file/a must be writable, got"):
        save_model(old, tmp_path / "file" / "a")


def test_a_link_is_followed(tmp_path: Path, old: HybridModel) -> None:
    save_model(old, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    save_model(random_model(tiny_config(), torch.bfloat16), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert load_model(tmp_path / "real").dtype == torch.bfloat16
    assert names(tmp_path) == ["link", "real"]
