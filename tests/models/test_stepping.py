"""A decoding step by half-layers equals the step layer by layer."""

import pytest
import torch
from model_cases import CPU, MOE, tiny_model, tokens

from sevenfold.models import Batch, MoEConfig, empty_state, hybrid
from sevenfold.ops.testing import check_error

SHARED = MoEConfig(num_local_experts=3, num_experts_per_tok=2, shared_intermediate_size=6)
MIXES = [
    {"layers": "ll"},
    {"layers": "lsf"},
    {"layers": "llf", "moe": MOE},
    {"layers": "lf", "moe": SHARED},
    {"layers": "lf", "norm_placement": "pre_norm"},
    {"layers": "lf", "linear_attn_norm_groups": 2},
]


def after_a_prompt(model, N: int, dtype: torch.dtype) -> tuple:
    state = empty_state(model.config, N, 12, device=CPU, dtype=dtype)
    prompt = Batch.rows(N, 5, device=CPU)
    return model.hidden(tokens(N, 5), prompt, state).state


def step(mix: dict, N: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Hidden vectors and linear states after one token more."""
    model = tiny_model(dtype=dtype, **mix)
    with torch.no_grad():
        batch = Batch.rows(N, 1, past=(5,) * N, device=CPU)
        state = after_a_prompt(model, N, dtype)
        found = model.hidden(tokens(N, 1, seed=1), batch, state)
    assert found.state is not None
    return [found.hidden, *(s.kv for s in found.state if hasattr(s, "kv"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(map(str, mix)))
def test_half_layers_equal_layers(
    mix: dict, N: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = []
    by_rows = hybrid.run_by_rows

    def recorded(layer, *rest):
        layers.append(layer)
        return by_rows(layer, *rest)

    monkeypatch.setattr(hybrid, "run_by_rows", recorded)
    found = step(mix, N, dtype)
    assert len(layers) == len(mix["layers"])
    monkeypatch.setattr(hybrid, "pays_by_rows", lambda x, batch: False)
    coarse, exact = step(mix, N, torch.float32), step(mix, N, torch.float64)
    assert len(layers) == len(mix["layers"])
    # Against itself fp64 has no error: it is taken as fp32's, as many times smaller as its eps.
    finer = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    for i, (got, near, truth) in enumerate(zip(found, coarse, exact, strict=True)):
        honest = (truth + (near.double() - truth) * finer).to(dtype)
        check_error(f"output {i}", got, honest, truth)


def test_a_packed_step_takes_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("lf", torch.float32, moe=MOE)
    with torch.no_grad():
        state = after_a_prompt(model, 3, torch.float32)
        rows = Batch.rows(3, 1, past=(5, 5, 5), device=CPU)
        packed = Batch.packed((1, 1, 1), past=(5, 5, 5), device=CPU)
        ids = tokens(3, 1, seed=1)
        by_row = model.hidden(ids, rows, state)
        by_pack = model.hidden(ids.view(1, 3), packed, state)
    assert torch.equal(by_row.hidden[:, 0], by_pack.hidden[0])


def test_training_and_gradients_go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("must not run by rows")

    monkeypatch.setattr(hybrid, "run_by_rows", refused)
    model = tiny_model("l", torch.float32)
    batch = Batch.rows(1, 1, device=CPU)

    def run() -> None:
        state = empty_state(model.config, 1, 4, device=CPU, dtype=torch.float32)
        model.hidden(tokens(1, 1), batch, state)

    run()
    with torch.no_grad():
        with pytest.raises(AssertionError, match="must not run by rows"):
            run()
        model.train()
        run()


@pytest.mark.parametrize("change", ["in place", "another tensor", "dtype", "strides"])
def test_changed_weights_count(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode, change the weights, decode again: as a model that has had them from the start."""
    model = tiny_model("lf", torch.float32, moe=MOE)
    batch = Batch.rows(1, 1, past=(5,), device=CPU)

    def run() -> torch.Tensor:
        with torch.no_grad():
            state = after_a_prompt(model, 1, model.dtype)
            return model.hidden(tokens(1, 1, seed=1), batch, state).hidden

    first = run()
    weight = model.layers[0].self_attn.qkv_proj.weight
    match change:
        case "in place":
            weight.data.mul_(1.5)
        case "another tensor":
            weight.data = weight.data * 1.5
        case "dtype":
            model = model.double()
        case "strides":
            weight.data = (weight.data * 1.5).t().contiguous().t()
    found = run()
    monkeypatch.setattr(hybrid, "pays_by_rows", lambda x, batch: False)
    honest = run()
    model = model.double()
    check_error("hidden", found, honest, run())
    assert not torch.equal(found, first)
