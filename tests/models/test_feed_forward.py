"""Dense and mixture-of-experts feed-forward, the router and its statistics."""

import math

import pytest
import torch
from model_cases import tiny_config
from torch import Tensor
from torch.nn import functional as F

from sevenfold.models import MoEConfig
from sevenfold.models.feed_forward import MixtureOfExperts, Router, SwiGLU
from sevenfold.models.router_stats import router_stats
from sevenfold.ops.testing import check_error

D = 8


def moe_layer(dtype: torch.dtype = torch.float64, **fields) -> MixtureOfExperts:
    moe = MoEConfig(**({"num_local_experts": 3} | fields))
    layer = MixtureOfExperts(tiny_config(moe=moe), moe)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).bfloat16() / 2
    return layer.to(dtype).requires_grad_(False)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, D, generator=generator).bfloat16().to(dtype)


def dense(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def token_by_token(layer: MixtureOfExperts, x: Tensor, capacity: int | None = None) -> Tensor:
    """The layer's formula for one token after another."""
    k, experts = layer.moe.num_experts_per_tok, layer.experts
    taken = [0] * layer.moe.num_local_experts
    outputs = []
    for token in x.flatten(0, 1):
        p = (layer.gate.weight @ token).softmax(0)
        best = p.detach().sort(descending=True).indices[:k].tolist()
        y = torch.zeros_like(token)
        for e in best:
            if capacity is None or taken[e] < capacity:
                y = y + p[e] / p[best].sum() * dense(
                    token, experts.gate_up_proj[e], experts.down_proj[e]
                )
            taken[e] += 1
        if layer.shared_mlp is not None:
            c = torch.sigmoid(layer.coefficient.weight[0] @ token)
            shared = layer.shared_mlp
            both = (shared.gate_up_proj.weight, shared.down_proj.weight)
            y = (1 - c) * y + c * dense(token, *both)
        outputs.append(y)
    return torch.stack(outputs).view_as(x)


def test_dense_swiglu_is_its_formula() -> None:
    layer = SwiGLU(D, 5).double().requires_grad_(False)
    x = inputs(2, 3)
    weights = (layer.gate_up_proj.weight, layer.down_proj.weight)
    exact = dense(x, *weights)
    check_error("y", layer(x), dense(x.flip(-1), weights[0].flip(-1), weights[1]), exact)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("shared", [None, 7])
def test_dropless_equals_token_by_token(shared: int | None, k: int) -> None:
    fields = {"num_experts_per_tok": k, "shared_intermediate_size": shared}
    layer, low = moe_layer(**fields).eval(), moe_layer(torch.float32, **fields).eval()
    x = inputs(2, 9)
    exact = token_by_token(layer, x)
    found, stats = low(x.float())
    check_error("fp32", found, token_by_token(low, x.float()), exact)
    assert stats is None
    in_single = found.double()
    check_error("fp64", layer(x)[0].float(), token_by_token(low, x.float()), exact)
    assert bool((layer(x)[0] - exact).abs().max() <= (in_single - exact).abs().max())


@pytest.mark.parametrize("shared", [None, 7])
@pytest.mark.parametrize("at", range(4))
def test_one_token_alone_equals_the_same_token_among_others(at: int, shared: int | None) -> None:
    fields = {"shared_intermediate_size": shared}
    x = inputs(1, 4)
    exact = token_by_token(moe_layer(**fields), x)[:, at : at + 1]
    low = moe_layer(torch.float32, **fields).eval()
    together = low(x.float())[0][:, at : at + 1]
    check_error("y", low(x.float()[:, at : at + 1])[0], together, exact)


def test_one_token_takes_a_gradient() -> None:
    layer = moe_layer().eval().requires_grad_(True)
    alone = torch.autograd.grad(layer(inputs(1, 1))[0].sum(), list(layer.parameters()))
    statement = token_by_token(layer, inputs(1, 1)).sum()
    exact = torch.autograd.grad(statement, list(layer.parameters()))
    low = moe_layer(torch.float32).eval().requires_grad_(True)
    honest = torch.autograd.grad(
        token_by_token(low, inputs(1, 1).float()).sum(), list(low.parameters())
    )
    for (name, _), found, eager, wanted in zip(
        low.named_parameters(), alone, honest, exact, strict=True
    ):
        check_error(name, found.float(), eager, wanted)


def test_training_and_evaluation_agree_without_a_capacity() -> None:
    layer, x = moe_layer(), inputs(2, 9)
    trained, counts = layer.train()(x)
    assert torch.equal(trained, layer.eval()(x)[0])
    assert router_stats([counts], 2).dropped.tolist() == [0.0]


@pytest.mark.parametrize("factor", [0.5, 0.75])
def test_tokens_are_dropped_in_training_only(factor: float) -> None:
    layer, x = moe_layer(capacity_factor=factor), inputs(1, 18)
    whole = token_by_token(layer, x)
    capacity = math.ceil(factor * 18 * 2 / 3)
    dropping = token_by_token(layer, x, capacity)
    low = moe_layer(torch.float32, capacity_factor=factor)
    trained, counts = low.train()(x.float())
    stats = router_stats([counts], 2)
    check_error("train", trained, token_by_token(low, x.float(), capacity), dropping)
    check_error("eval", low.eval()(x.float())[0], token_by_token(low, x.float()), whole)
    assert not bool((dropping == whole).all())
    chosen = (stats.load * 18).round()
    kept = chosen.clamp(max=capacity).sum() / chosen.sum()
    assert stats.dropped > 0
    check_error("dropped", stats.dropped[0], (1 - kept).float(), 1 - kept.double())


@pytest.mark.parametrize(
    ("factor", "num_tokens", "capacity"), [(1.0, 6, 4), (1.0, 7, 5), (0.5, 7, 3), (0.01, 1, 1)]
)
def test_capacity_formula(factor: float, num_tokens: int, capacity: int) -> None:
    # ceil(c * tokens * 2 / 3)
    assert moe_layer(capacity_factor=factor).capacity(num_tokens) == capacity
    assert moe_layer().capacity(num_tokens) is None


def test_an_earlier_token_keeps_its_expert() -> None:
    layer = moe_layer(capacity_factor=0.5).train()
    x = inputs(1, 6)
    first = layer(x)[0][:, :2]
    x[:, 2:] = inputs(1, 4).flip(1) * 3
    assert torch.equal(layer(x)[0][:, :2], first)


def router(dtype: torch.dtype, E: int = 4, k: int = 2) -> Router:
    layer = Router(D, MoEConfig(num_local_experts=E, num_experts_per_tok=k))
    generator = torch.Generator().manual_seed(2)
    layer.weight.data = torch.randn(E, D, generator=generator).bfloat16()
    return layer.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_router_chooses_in_fp32_with_weights_that_sum_to_one(k: int, dtype: torch.dtype) -> None:
    x = inputs(11, dtype=dtype)
    weights, experts, totals = router(dtype, k=k).eval()(x)
    wide = torch.promote_types(dtype, torch.float32)
    assert weights.dtype == wide
    assert totals is None
    exact, logits = x.double() @ router(torch.float64).weight.T, x.to(wide) @ router(wide).weight.T
    assert torch.equal(experts, exact.topk(k, dim=-1).indices)
    total = weights.sum(-1)
    check_error("sum", total, torch.ones_like(total), torch.ones(11, dtype=torch.float64))
    softmax_of_chosen = exact.topk(k, dim=-1).values.softmax(-1)
    check_error("weights", weights, logits.gather(1, experts).softmax(-1), softmax_of_chosen)


def test_autocast_leaves_the_router_in_fp32() -> None:
    layer, x = router(torch.float32), inputs(11, dtype=torch.float32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def stats_of(logits: list[list[float]], k: int):
    """The statistics of a layer with hand-made logits: the router passes its input through."""
    E = len(logits[0])
    moe = MoEConfig(num_local_experts=E, num_experts_per_tok=k)
    layer = MixtureOfExperts(tiny_config(moe=moe, hidden_size=E), moe).double().train()
    for parameter in layer.parameters():
        parameter.data.zero_()
    layer.gate.weight.data = torch.eye(E, dtype=torch.float64)
    return router_stats([layer(torch.tensor([logits], dtype=torch.float64))[1]], k)


def test_hand_worked_balance_and_z_loss() -> None:
    # p = (3/4, 1/4), (1/4, 3/4), (3/4, 1/4), (3/4, 1/4); each token chooses the more probable.
    a, b = math.log(3), 0.0
    stats = stats_of([[a, b], [b, a], [a, b], [a, b]], k=1)
    assert stats.load.tolist() == [[0.75, 0.25]]
    # 2 * (3/4 * 10/16 + 1/4 * 6/16), and ln(4)^2
    assert f"{stats.balance_loss.item():.12f}" == "1.125000000000"
    assert f"{stats.z_loss.item():.12f}" == f"{math.log(4) ** 2:.12f}"
    assert stats.dropped.tolist() == [0.0]


def test_balanced_loss_is_the_number_of_choices() -> None:
    stats = stats_of([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]], k=2)
    assert stats.load.tolist() == [[0.5] * 4]
    assert f"{stats.balance_loss.item():.12f}" == "2.000000000000"


def test_balance_loss_pushes_the_crowded_expert_down() -> None:
    layer = moe_layer().train().requires_grad_(True)
    stats = router_stats([layer(inputs(1, 12))[1]], 2)
    assert not stats.load.requires_grad
    (dweight,) = torch.autograd.grad(stats.balance_loss, layer.gate.weight)
    with torch.no_grad():
        layer.gate.weight -= 1e-3 * dweight
    after = router_stats([layer(inputs(1, 12))[1]], 2)
    assert (after.balance_loss < stats.balance_loss).all()


def grads(layer: MixtureOfExperts, run, x: Tensor) -> tuple[Tensor, ...]:
    layer.train().requires_grad_(True)
    return torch.autograd.grad(run(x).square().sum(), list(layer.parameters()))


def test_every_parameter_gets_the_gradient_of_the_statement() -> None:
    exactly, low = (
        moe_layer(dtype, shared_intermediate_size=7) for dtype in (torch.float64, torch.float32)
    )
    x = inputs(1, 9)
    exact = grads(exactly, lambda x: token_by_token(exactly, x), x)
    honest = grads(low, lambda x: token_by_token(low, x), x.float())
    found = grads(low, lambda x: low(x)[0], x.float())
    for (name, _), *three in zip(low.named_parameters(), found, honest, exact, strict=True):
        check_error(name, *three)
