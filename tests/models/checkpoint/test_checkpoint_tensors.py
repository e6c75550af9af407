"""Weights that do not fit their config.json: every fault named, nothing loaded in part."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import edit_tensors, random_model, tiny_config
from safetensors.torch import save_file

from sevenfold.config import CheckpointError, UnsupportedError
from sevenfold.models.checkpoint import convert, load_model, save_model

W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_model(random_model(tiny_config()), tmp_path / "single", format="hf")
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(random_model(tiny_config()), tmp_path / "sharded", format="hf", max_shard_bytes=9000)
    return tmp_path / "sharded"


def assert_refused(folder: Path, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither loaded nor converted, and no parameter ever allocated."""
    with monkeypatch.context() as patched:
        patched.setattr("sevenfold.models.checkpoint.load._allocate", never)
        with pytest.raises((CheckpointError, UnsupportedError), match=message) as caught:
            load_model(folder)
        assert str(folder) in str(caught.value)
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        convert(folder, folder.with_name("converted"), to="sevenfold")
    assert not folder.with_name("converted").exists()


def never(*_: object) -> None:
    raise AssertionError("allocated before everything was checked")


EDITS = [
    (
        lambda t: t.update({W1.replace("w1", "w4"): torch.ones(2)}),
        r"model.safetensors: tensor must be a known name, got .*w4.weight'; did you mean 'model",
    ),
    (
        lambda t: t.pop(W1),
        rf"tensor {W1} must be present, got none; the download or copy may be incomplete",
    ),
    (
        lambda t: [t.pop("lm_head.weight"), t.pop("model.norm.weight")],
        r"tensor model.norm.weight and 1 more must be present, got none",
    ),
    (
        lambda t: t.update({W1: torch.ones(32, 24)}),
        rf"tensor {W1} must have shape \[24, 32\], got \[32, 24\]; config.json and the weights",
    ),
    (
        lambda t: t.update({W1: torch.ones(24, 32, dtype=torch.int8)}),
        rf"tensor {W1} must have one of the dtypes F64, F32, F16, BF16, got I8; dequantise",
    ),
]


@pytest.mark.parametrize(("edit", "message"), EDITS)
def test_a_tensor_that_does_not_fit(single: Path, edit, message: str, monkeypatch) -> None:
    edit_tensors(single, edit)
    assert_refused(single, message, monkeypatch)


def test_decay_buffers_have_no_place_in_our_own_files(tmp_path: Path) -> None:
    save_model(random_model(tiny_config()), tmp_path / "a")
    decay = {"layers.0.self_attn.slope_rate": torch.ones(4)}
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update(decay))
    with pytest.raises(CheckpointError, match=r"got 'layers.0.self_attn.slope_rate'"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("cut", [4, 100, 100_000])
def test_a_truncated_file(single: Path, cut: int, monkeypatch) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    message = r"model.safetensors must be a whole safetensors file, got: .*; the download"
    assert_refused(single, message, monkeypatch)


def test_a_missing_shard(sharded: Path, monkeypatch) -> None:
    next(sharded.glob("model-00003-*")).unlink()
    message = r"model-00003-of-\d+.safetensors must be a whole safetensors file, got: No such file"
    assert_refused(sharded, message, monkeypatch)


def test_no_weights_at_all(single: Path, monkeypatch) -> None:
    (single / "model.safetensors").unlink()
    message = r"must hold model.safetensors or model.safetensors.index.json, got neither"
    assert_refused(single, message, monkeypatch)


def test_two_sets_of_weights(sharded: Path, monkeypatch) -> None:
    (sharded / "model.safetensors").write_bytes(b"")
    assert_refused(sharded, r"got both; delete the stale one", monkeypatch)


def edit_index(folder: Path, **weight_map: str) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= {name.replace("__", "."): shard for name, shard in weight_map.items()}
    file.write_text(json.dumps(index))


def test_an_index_that_points_elsewhere(sharded: Path, monkeypatch) -> None:
    edit_index(sharded, lm_head__weight="../other/model.safetensors")
    message = r"lm_head.weight must lie in a plain file name, got '../other/model.safetensors'"
    assert_refused(sharded, message, monkeypatch)


def test_an_index_that_promises_too_much(sharded: Path, monkeypatch) -> None:
    first = min(sharded.glob("*.safetensors")).name
    edit_index(sharded, lm_head__bias=first)
    message = rf"{first}: tensor lm_head.bias must be present as model.safetensors.index.json says"
    assert_refused(sharded, message, monkeypatch)


def test_an_index_without_a_map(sharded: Path, monkeypatch) -> None:
    (sharded / "model.safetensors.index.json").write_text("{}")
    assert_refused(sharded, r"weight_map must be a table of names, got None", monkeypatch)


def test_a_tensor_in_two_shards(single: Path, monkeypatch) -> None:
    (single / "model.safetensors").unlink()
    save_file({"a": torch.ones(1)}, single / "1.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, single / "2.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (single / "model.safetensors.index.json").write_text(json.dumps(index))
    message = r"2.safetensors: tensor a must lie in one file, got a second in 1.safetensors; delete"
    assert_refused(single, message, monkeypatch)
