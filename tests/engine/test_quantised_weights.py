"""Weights in int8 and fp8: quantised as they are read, near the model that they came from."""

from pathlib import Path

import pytest
import torch
from engine_helpers import MOE, tiny_model, uncached
from tokenizers import Tokenizer

from sevenfold.config import CheckpointError, ConfigError, UnsupportedError
from sevenfold.engine import LLM, SamplingParams
from sevenfold.engine.quantised_weights import (
    QuantisedExperts,
    QuantisedLinear,
    load_quantised_model,
)
from sevenfold.engine.runners import is_recordable
from sevenfold.models import HybridModel, MoEConfig
from sevenfold.models.accounting import WeightFormat
from sevenfold.models.checkpoint import CheckpointFormat, convert, load_model, save_model
from sevenfold.ops import (
    Impl,
    Int8Rows,
    dequantise_rows,
    fp8_linear,
    int8_mixture,
    mixture,
    plan_dispatch,
    quantise_rows,
    quantise_rows_fp8,
)
from sevenfold.ops.testing import check_error

SHARED = MoEConfig(num_local_experts=3, num_experts_per_tok=2, shared_intermediate_size=6)


def dequantised(model: HybridModel, weights: str) -> HybridModel:
    """A plain model whose matrices hold what int8 leaves of them."""
    plain = HybridModel(model.config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, x in plain.named_parameters():
            is_expert = ".experts." in name
            is_kept = ".mlp.gate." in name or "coefficient" in name or not name.startswith("layers")
            if x.dim() > 1 and not is_kept and (is_expert or weights == "int8"):
                x.copy_(dequantise_rows(*quantise_rows(x)))
    return plain.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["sevenfold", "hf", "minimax"])
@pytest.mark.parametrize("weights", ["int8", "int8-experts"])
def test_it_computes_what_the_dequantised_model_does(
    tmp_path: Path, kind: CheckpointFormat, weights: WeightFormat
) -> None:
    model = tiny_model("lf", moe=MOE if kind == "hf" else SHARED)
    save_model(model, tmp_path / "sevenfold")
    if kind != "sevenfold":
        convert(tmp_path / "sevenfold", tmp_path / kind, to=kind)
    loaded, plain = load_quantised_model(tmp_path / kind, weights), dequantised(model, weights)
    ids = torch.tensor([[5, 7, 250, 4, 4, 9, 11]])
    with torch.inference_mode():
        found, wanted, before = loaded(ids), plain(ids), model(ids)
        exact = HybridModel(model.config).double()
        exact.load_state_dict(plain.double().state_dict())
        check_error("logits", found, wanted, exact.eval()(ids))
    assert not torch.equal(found, before)
    modules = [type(module) for module in loaded.modules()]
    assert QuantisedExperts in modules
    linear = sum(isinstance(m, QuantisedLinear) for m in loaded.modules())
    # Two of the experts of each layer; then 3 and 4 of the mixers, 2 of each shared expert.
    shared = 0 if kind == "hf" else 4
    assert linear == 4 + (7 + shared) * (weights == "int8")
    assert not any(p.requires_grad and p.dtype is torch.int8 for p in loaded.parameters())


@pytest.mark.parametrize("weights", ["fp8", "fp8-experts"])
def test_fp8_holds_the_rows_that_were_read(tmp_path: Path, weights: WeightFormat) -> None:
    model = tiny_model("lf", moe=SHARED)
    save_model(model, tmp_path / "a")
    loaded = load_quantised_model(tmp_path / "a", weights)
    plain, found = dict(model.named_parameters()), 0
    for name, module in loaded.named_modules():
        if isinstance(module, QuantisedLinear):
            weight = plain[name] if name in plain else plain[f"{name}.weight"]
            wanted = quantise_rows_fp8(weight)
            assert torch.equal(module.codes.float(), wanted.codes.float())
            assert torch.equal(module.scale, wanted.scale)
            x = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(found))
            if weight.dim() == 2:
                assert torch.equal(module(x), fp8_linear(x, *wanted))
            found += 1
    assert found == 4 + (7 + 4) * (weights == "fp8")


def test_fp8_is_refused_where_the_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A100")
    message = (
        "fp8 weights must lie on a GPU of compute capability 8.9 or more, got NVIDIA A100 of 8.0; "
        "use int8"
    )
    with pytest.raises(UnsupportedError, match=message):
        load_quantised_model("nowhere", "fp8-experts", device="cuda")
    with pytest.raises(UnsupportedError, match="fp8 weights must lie on a GPU or a CPU, got mps"):
        load_quantised_model("nowhere", "fp8", device="mps")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 9))
    with pytest.raises(CheckpointError, match="nowhere"):
        load_quantised_model("nowhere", "fp8", device="cuda")


def test_steps_with_8_bit_weights_are_recorded_where_their_kernels_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny_model("lf", moe=MOE), tmp_path / "a")
    loaded = load_quantised_model(tmp_path / "a", "int8")
    assert not is_recordable(loaded)
    monkeypatch.setattr("sevenfold.engine.runners.default_int8_impl", lambda x: Impl.TRITON)
    assert is_recordable(loaded)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_decoding_goes_through_it(
    tmp_path: Path, tokenizer: Tokenizer, weights: WeightFormat
) -> None:
    """Step by step, where a plain model would run by half-layers."""
    model = tiny_model("llf", moe=MOE)
    save_model(model, tmp_path / "a")
    tokenizer.save(str(tmp_path / "a" / "tokenizer.json"))
    llm = LLM(tmp_path / "a", weights=weights)
    [found] = llm.generate(["the old heron"], SamplingParams(max_tokens=8, temperature=0))
    assert list(found.token_ids) == uncached(
        llm.model, list(found.prompt_token_ids), len(found.token_ids)
    )


def test_what_is_not_quantised_takes_another_dtype(tmp_path: Path) -> None:
    save_model(tiny_model("llf", moe=MOE), tmp_path / "a")
    half = load_quantised_model(tmp_path / "a", "int8-experts", dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16
    ids = torch.tensor([[5, 7, 250, 4]])
    exact = load_model(tmp_path / "a")(ids)
    assert (half(ids) - exact).norm() / exact.norm() < 0.2


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_a_model_without_experts(tmp_path: Path, weights: WeightFormat) -> None:
    model = tiny_model("lf")
    save_model(model, tmp_path / "a")
    with pytest.raises(
        ConfigError,
        match=f"weights must be {weights} for a model without experts, where {weights}-experts has",
    ):
        load_quantised_model(tmp_path / "a", f"{weights}-experts")
    loaded = load_quantised_model(tmp_path / "a", weights)
    # qkv, gate, out; q, k, v, o; gate_up and down of each layer.
    assert sum(isinstance(m, QuantisedLinear) for m in loaded.modules()) == 3 + 4 + 4


def test_the_mixture_is_that_of_the_dequantised_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    E, F, D, T = 4, 6, 8, 9
    x = torch.randn(T, D, generator=generator)
    weights = torch.rand(T, 2, generator=generator)
    # Expert 2 gets nobody.
    dispatch = plan_dispatch(torch.tensor([[0, 1], [3, 0], [1, 3]] * 3), E, None)
    gate_up = quantise_rows(torch.randn(E, 2 * F, D, generator=generator))
    down = quantise_rows(torch.randn(E, D, F, generator=generator))
    plain = [dequantise_rows(*rows) for rows in (gate_up, down)]
    found = int8_mixture(x, weights, gate_up, down, dispatch)
    eager = mixture(x, weights, *plain, dispatch, impl="eager")
    wide = (x.double(), weights.double(), *(w.double() for w in plain))
    check_error("y", found, eager, mixture(*wide, dispatch, impl="eager"))
    with pytest.raises(ValueError, match=r"gate_up_proj.scale must have shape \[E, N\]"):
        int8_mixture(x, weights, Int8Rows(gate_up.codes, down.scale), down, dispatch)
    with pytest.raises(TypeError, match=r"down_proj.codes must be torch.int8, got torch.float32"):
        int8_mixture(x, weights, gate_up, Int8Rows(plain[1], down.scale), dispatch)
