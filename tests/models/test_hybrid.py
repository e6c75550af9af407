"""The whole model: its residuals, its dtypes, its parameters, and a decay that nothing casts."""

import copy

import pytest
import torch
from model_cases import CPU, MOE, by_other_products, furthest, tiny_config, tiny_model, tokens
from torch import Tensor

from sevenfold.models import Batch, HybridModel, empty_state, hybrid
from sevenfold.models.block import Block
from sevenfold.ops import head_logits, layer_log_decay
from sevenfold.ops.testing import check_error

FACTORS = {
    "linear_attn_alpha_factor": 2.0,
    "linear_attn_beta_factor": 0.5,
    "full_attn_alpha_factor": 3.0,
    "full_attn_beta_factor": 0.25,
    "mlp_alpha_factor": 1.5,
    "mlp_beta_factor": 0.75,
}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def by_hand(block: Block, x: Tensor, layers: str, placement: str) -> Tensor:
    a, b = (2.0, 0.5) if layers == "l" else (3.0, 0.25)
    batch = Batch.rows(*x.shape[:2], device=CPU)
    u = norm(x, block.input_layernorm.weight)
    x = a * (u if placement == "post_norm" else x) + b * block.self_attn(u, batch, None)[0]
    u = norm(x, block.post_attention_layernorm.weight)
    return 1.5 * (u if placement == "post_norm" else x) + 0.75 * block.mlp(u)


@pytest.mark.parametrize("placement", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("layers", ["l", "f", "s"])
def test_residuals_of_a_block(layers: str, placement: str) -> None:
    models = [
        tiny_model(layers, dtype, norm_placement=placement, **FACTORS)
        for dtype in (torch.float64, torch.float32)
    ]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=generator).bfloat16().double()
    batch = Batch.rows(2, 5, device=CPU)
    exact = by_hand(models[0].layers[0], x, layers, placement)
    single = models[1].layers[0]
    honest = by_hand(single, x.float(), layers, placement)
    check_error("block", single(x.float(), batch, None)[0], honest, exact)


def test_the_head_follows_the_final_norm() -> None:
    model, ids = tiny_model("lf", torch.float32), tokens(2, 5)
    batch = Batch.rows(2, 5, device=CPU)
    x = model.embed_tokens.weight[ids]
    for block in model.layers:
        x = block(x, batch, None)[0]
    assert torch.equal(model(ids), head_logits(model.norm(x), model.lm_head.weight))
    assert torch.equal(model.hidden(ids).hidden, model.norm(x))


def test_the_number_of_parameters_by_hand() -> None:
    # hidden 8, 2 heads of 6 (1 for keys), feed-forward 10, vocabulary 19.
    linear = 8 * 36 + 8 * 12 + 12 * 8 + 12  # q k v, gate, output, norm
    full = 8 * 12 + 2 * 8 * 6 + 12 * 8
    dense, norms = 3 * 8 * 10, 2 * 8
    whole = 2 * 19 * 8 + 8 + (linear + dense + norms) + (full + dense + norms)
    assert whole == 1_604
    assert sum(p.numel() for p in HybridModel(tiny_config("lf")).parameters()) == whole
    tied = HybridModel(tiny_config("lf", tie_word_embeddings=True))
    assert sum(p.numel() for p in tied.parameters()) == whole - 19 * 8
    experts = HybridModel(tiny_config("lf", moe=MOE))
    extra = 2 * (2 * dense + 3 * 8)  # two more experts and a router in each layer
    assert sum(p.numel() for p in experts.parameters()) == whole + extra


def test_a_tied_head_is_the_embedding() -> None:
    model = tiny_model("l", tie_word_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.to(torch.bfloat16).lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize(
    ("dtype", "logits"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_logits_have_fp32_at_least(dtype: torch.dtype, logits: torch.dtype) -> None:
    model, ids = tiny_model("lfs", dtype), tokens(2, 5)
    found = model(ids)
    assert (found.dtype, model.dtype, model.device) == (logits, dtype, CPU)
    hidden = model.hidden(ids).hidden
    assert hidden.dtype == dtype
    exact = hidden.double() @ model.lm_head.weight.double().T
    check_error("logits", found, (hidden.to(logits) @ model.lm_head.weight.to(logits).T), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", ["ll", "lfs", "lllllllf"])
def test_low_precision_keeps_the_error_rule(layers: str, dtype: torch.dtype) -> None:
    ids, seeds = tokens(2, 70), range(4)  # one model's largest error is luck
    exact = torch.cat([tiny_model(layers, seed=seed)(ids) for seed in seeds])
    models = [tiny_model(layers, dtype, seed) for seed in seeds]
    honest = torch.cat([by_other_products(model, ids) for model in models])
    found = torch.cat([model(ids) for model in models])
    check_error("logits", found.to(dtype), honest.to(dtype), exact)


def test_router_statistics_in_training_only() -> None:
    model, ids = tiny_model("lf", moe=MOE), tokens(1, 6)
    assert model.hidden(ids).router == ()
    stats = model.train().router_stats(model.hidden(ids).router)
    assert stats is not None
    assert (stats.load * 6).round().sum(1).tolist() == [12.0, 12.0]
    dense = tiny_model("lf").train().hidden(ids)
    assert dense.router == ()
    assert model.router_stats(()) is None
    assert dense.state is None


def test_ids_of_another_shape_than_the_batch() -> None:
    message = r"input_ids must have the batch's shape \[1, 5\], got \[1, 6\]"
    with pytest.raises(ValueError, match=message):
        tiny_model("l").hidden(tokens(1, 6), Batch.packed([2, 3], device=CPU))


EXPECTED = [layer_log_decay(2, layer, 3) for layer in (0, 1)]


def check_decay(model: HybridModel) -> None:
    found = [model.layers[layer].self_attn.log_decay for layer in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(found, EXPECTED, strict=True))
    assert all((x.dtype, x.device.type) == (torch.float32, "cpu") for x in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_decay_is_never_cast(dtype: torch.dtype) -> None:
    model = HybridModel(tiny_config("llf"))
    for moved in (model.to(dtype), model.to(CPU, dtype), model.float().half().double()):
        check_decay(moved)
    check_decay(copy.deepcopy(model))


def test_the_decay_is_never_stored() -> None:
    model = tiny_model("llf", torch.float32)
    assert not [name for name in model.state_dict() if "decay" in name or "slope" in name]
    assert dict(model.named_buffers()) == {}
    other = HybridModel(tiny_config("llf"))
    other.load_state_dict(model.state_dict())
    check_decay(other)
    assert torch.equal(other.eval().requires_grad_(False)(tokens(1, 5)), model(tokens(1, 5)))


def test_the_decay_survives_the_meta_device() -> None:
    with torch.device("meta"):
        model = HybridModel(tiny_config("llf"))
    assert model.device.type == "meta"
    check_decay(model)
    source = tiny_model("llf", torch.float32)
    model = model.bfloat16().to_empty(device="cpu").float()
    check_decay(model)
    model.load_state_dict(source.state_dict())
    assert torch.equal(model.eval().requires_grad_(False)(tokens(1, 5)), source(tokens(1, 5)))
    check_decay(HybridModel(tiny_config("llf")).to("meta").to_empty(device="cpu"))


def test_every_parameter_takes_part() -> None:
    model = tiny_model("lsf", torch.float32, moe=MOE).train().requires_grad_(True)
    model(tokens(2, 40)).square().sum().backward()
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert still == []


def test_no_state_in_no_state_out() -> None:
    model, ids = tiny_model("lf", torch.float32), tokens(2, 5)
    state = empty_state(model.config, 2, 5, device=CPU, dtype=torch.float32)
    with_state = model.hidden(ids, Batch.rows(2, 5, device=CPU), state)
    without = model.hidden(ids)
    assert without.state is None
    assert len(with_state.state) == 2
    exact = tiny_model("lf").hidden(ids).hidden
    honest = furthest(exact, without.hidden, without.hidden)
    check_error("hidden", with_state.hidden, honest, exact)


def test_large_logits_have_their_memory_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("lf", torch.float32), tokens(2, 9)
    exact, eager = tiny_model("lf")(ids), model(ids)
    rooms = []

    def recorded(num_rows: int, weight: Tensor) -> Tensor:
        rooms.append((num_rows, len(weight)))
        return torch.full((num_rows, len(weight)), torch.nan)

    monkeypatch.setattr(hybrid, "room_for_logits", recorded)
    with torch.no_grad():
        found = model(ids)
        assert rooms == [(18, model.config.vocab_size)]
        honest = furthest(exact, eager, by_other_products(model, ids))
        check_error("logits", found, honest, exact)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[1:])  # one rank's part
        assert model(ids).shape[-1] == model.config.vocab_size - 1
    assert len(rooms) == 2  # by_other_products ran the model too
