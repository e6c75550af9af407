"""Saving, loading and converting: every bit comes back, in every format and dtype."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import (
    FORMATS,
    FULL,
    LINEAR,
    SLIDING,
    contents,
    edit_tensors,
    random_ids,
    random_model,
    tiny_config,
)
from safetensors import safe_open
from safetensors.torch import load_file

from sevenfold.config import CheckpointError, UnsupportedError
from sevenfold.models import HybridModel, MoEConfig
from sevenfold.models.checkpoint import (
    convert,
    detect_format,
    load_model,
    read_config,
    save_model,
)

SHARED = MoEConfig(
    num_local_experts=3,
    shared_intermediate_size=20,
    capacity_factor=1.25,
    router_aux_loss_coef=0.02,
    router_z_loss_coef=1e-3,
)
EXPRESSIBLE = {
    "plain": (tiny_config(), FORMATS),
    "tied": (tiny_config(tie_word_embeddings=True), FORMATS),
    "training": (tiny_config(initialization="normal", initializer_range=0.01), FORMATS),
    "shared": (tiny_config(moe=SHARED), ("sevenfold", "minimax")),
    "pre-norm": (tiny_config(norm_placement="pre_norm"), ("sevenfold", "minimax")),
    "dense": (tiny_config(moe=None), ("sevenfold",)),
    "sliding": (
        tiny_config(layer_types=(SLIDING, LINEAR, FULL), sliding_window=8),
        ("sevenfold",),
    ),
}
SAVED = [
    pytest.param(config, format, id=f"{name}-{format}")
    for name, (config, formats) in EXPRESSIBLE.items()
    for format in formats
]


def assert_equal_models(one: HybridModel, other: HybridModel) -> None:
    parameters = dict(other.named_parameters())
    assert parameters.keys() == dict(one.named_parameters()).keys()
    for name, parameter in one.named_parameters():
        assert parameter.dtype == parameters[name].dtype, name
        assert torch.equal(parameter, parameters[name]), name


@pytest.mark.parametrize(("config", "format"), SAVED)
def test_a_saved_model_comes_back(tmp_path: Path, config, format) -> None:
    model = random_model(config)
    save_model(model, tmp_path / "a", format=format, max_shard_bytes=10_000)
    assert detect_format(tmp_path / "a") == format
    assert read_config(tmp_path / "a") == config
    loaded = load_model(tmp_path / "a")
    assert not loaded.training
    assert_equal_models(loaded, model)
    ids = random_ids(config, 30)
    assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_narrow_weights_keep_full_routers(tmp_path: Path, format, dtype: torch.dtype) -> None:
    model = random_model(tiny_config(), dtype)
    save_model(model, tmp_path / "a", format=format)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    full = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert full == {
        name for name in stored if name.endswith(("mlp.gate.weight", "moe.gate.weight"))
    }
    assert len(full) == 4
    loaded = load_model(tmp_path / "a")
    assert loaded.dtype == dtype
    assert_equal_models(loaded, model)
    ids = random_ids(model.config, 30)
    assert torch.equal(loaded(ids), model(ids))


def test_dtype_casts_every_weight_but_routers(tmp_path: Path) -> None:
    model = random_model(tiny_config(moe=SHARED))
    save_model(model, tmp_path / "a", format="minimax")
    loaded = load_model(tmp_path / "a", dtype=torch.bfloat16)
    kept = {name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    mlps = [f"layers.{i}.mlp" for i in range(4)]
    assert kept == {f"{m}.{part}.weight" for m in mlps for part in ("gate", "coefficient")}
    for name, parameter in model.named_parameters():
        expected = parameter if name in kept else parameter.bfloat16()
        assert torch.equal(loaded.get_parameter(name), expected), name


def test_fp64_stays_fp64_and_ours(tmp_path: Path) -> None:
    model = random_model(tiny_config()).double()
    save_model(model, tmp_path / "a")
    assert_equal_models(load_model(tmp_path / "a"), model)
    with pytest.raises(
        UnsupportedError, match=r"embed_tokens.weight must be at most fp32 in format 'hf'"
    ):
        save_model(model, tmp_path / "b", format="hf")
    assert not (tmp_path / "b").exists()


def test_decays_are_values_on_the_weights_device(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    save_model(model, tmp_path / "a")
    loaded = load_model(tmp_path / "a", device=torch.device("cpu"), dtype=torch.bfloat16)
    for layer in range(3):
        decay = loaded.layers[layer].self_attn.log_decay
        assert torch.equal(decay, model.layers[layer].self_attn.log_decay)
        assert (decay.dtype, decay.device) == (torch.float32, loaded.device)


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    save_model(random_model(config), tmp_path / "a", format="hf")
    assert "lm_head.weight" not in load_file(tmp_path / "a" / "model.safetensors")
    loaded = load_model(tmp_path / "a")
    assert loaded.lm_head.weight is loaded.embed_tokens.weight


@pytest.mark.parametrize("there", FORMATS)
@pytest.mark.parametrize("here", FORMATS)
def test_conversion_is_bit_for_bit_there_and_back(tmp_path: Path, here, there) -> None:
    config = tiny_config(initialization="normal")
    save_model(
        random_model(config, torch.bfloat16), tmp_path / "a", format=here, max_shard_bytes=9_000
    )
    (tmp_path / "a" / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 9}')
    convert(tmp_path / "a", tmp_path / "b", to=there, max_shard_bytes=7_000)
    assert detect_format(tmp_path / "b") == there
    assert read_config(tmp_path / "b") == config
    assert_equal_models(load_model(tmp_path / "b"), load_model(tmp_path / "a"))
    convert(tmp_path / "b", tmp_path / "c", to=here, max_shard_bytes=9_000)
    assert contents(tmp_path / "c") == contents(tmp_path / "a")


def test_conversion_keeps_every_dtype(tmp_path: Path) -> None:
    save_model(random_model(tiny_config()), tmp_path / "a", format="hf")
    edit_tensors(tmp_path / "a", bfloat16_but_norms)
    convert(tmp_path / "a", tmp_path / "b", to="sevenfold")
    convert(tmp_path / "b", tmp_path / "c", to="hf")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name])
    # Mixed files convert as they are; a model has one dtype, and asks which.
    with pytest.raises(CheckpointError, match=r"norm.weight must have the embedding's dtype"):
        load_model(tmp_path / "c")
    assert load_model(tmp_path / "c", dtype=torch.float32).dtype == torch.float32


def bfloat16_but_norms(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            tensors[name] = tensor.bfloat16()


def test_halves_of_two_dtypes_do_not_become_one(tmp_path: Path) -> None:
    save_model(random_model(tiny_config()), tmp_path / "a", format="hf")
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update({name: tensors[name].half()}))
    with pytest.raises(CheckpointError, match=r"1.w3.weight must have the dtype of .*0.w1.weight"):
        convert(tmp_path / "a", tmp_path / "b", to="sevenfold")
    assert not (tmp_path / "b").exists()


def test_decay_buffers_in_a_file_are_ignored(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    save_model(model, tmp_path / "a", format="hf")
    prefix = "model.layers.0.self_attn"
    wrong = torch.full((4, 1, 1), 9.0)
    names = ("slope_rate", "query_decay", "key_decay", "diagonal_decay", "rotary_emb.inv_freq")
    buffers = {f"{prefix}.{name}": wrong.clone() for name in names}
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update(buffers))
    assert_equal_models(load_model(tmp_path / "a"), model)
    convert(tmp_path / "a", tmp_path / "b", to="minimax")
    assert not buffers.keys() & load_file(tmp_path / "b" / "model.safetensors").keys()


def test_shards_keep_to_their_size_and_say_so(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    save_model(model, tmp_path / "a", format="hf", max_shard_bytes=10_000)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    for file in (tmp_path / "a").glob("*.safetensors"):
        tensors = load_file(file)
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        assert len(tensors) == 1 or sum(4 * t.numel() for t in tensors.values()) <= 10_000
        with safe_open(file, "pt") as mapped:
            assert mapped.metadata() == {"format": "pt"}


@pytest.mark.parametrize("call", [save_model, convert])
def test_a_shard_must_hold_something(tmp_path: Path, call) -> None:
    first = random_model(tiny_config()) if call is save_model else tmp_path
    options = {} if call is save_model else {"to": "hf"}
    with pytest.raises(ValueError, match=r"max_shard_bytes must be at least 1, got 0"):
        call(first, tmp_path / "a", max_shard_bytes=0, **options)


def test_convert_refuses_its_own_source_and_an_unknown_format(tmp_path: Path) -> None:
    save_model(random_model(tiny_config()), tmp_path / "a")
    with pytest.raises(ValueError, match=r"dst must be another folder than src"):
        convert(tmp_path / "a", tmp_path / "." / "a", to="hf")
    with pytest.raises(ValueError, match=r"format must be one of sevenfold, hf, minimax, got 'pt'"):
        convert(tmp_path / "a", tmp_path / "b", to="pt")


def test_a_tokenizer_travels_along(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "modeling.py").write_text("raise SystemExit")
    save_model(model, tmp_path / "a", tokenizer=source)
    names = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert contents(tmp_path / "a").keys() == names
    save_model(model, tmp_path / "b", tokenizer=source / "tokenizer.json")
    assert contents(tmp_path / "b").keys() == names - {"chat_template.jinja"}
    with pytest.raises(CheckpointError, match=r"tokenizer must be a tokenizer.json or its folder"):
        save_model(model, tmp_path / "c", tokenizer=tmp_path / "nowhere")
    assert not (tmp_path / "c").exists()


def test_dtype_must_be_a_weight_s(tmp_path: Path) -> None:
    save_model(random_model(tiny_config()), tmp_path / "a")
    with pytest.raises(UnsupportedError, match=r"dtype must be one of .*, got torch.int8"):
        load_model(tmp_path / "a", dtype=torch.int8)
