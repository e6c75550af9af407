import math

import pytest
import torch
from torch import nn

from sevenfold.config import ConfigError, parse_config
from sevenfold.ops.testing import check_error
from sevenfold.optim import AdamWConfig, build_adamw, parameter_groups


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(4, 3)
        self.norm = nn.LayerNorm(3, bias=False)
        self.proj = nn.Linear(3, 2, bias=False)


def decays(model: nn.Module, **options) -> dict[str, float]:
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1, **options)
    of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters()}


def test_norms_never_decay_and_the_embedding_by_choice() -> None:
    everywhere = {"embed_tokens.weight": 0.1, "norm.weight": 0.0, "proj.weight": 0.1}
    assert decays(Small()) == everywhere
    assert decays(Small(), decay_embeddings=False) == everywhere | {"embed_tokens.weight": 0.0}


def test_a_group_without_parameters_is_left_out() -> None:
    groups = parameter_groups(nn.Linear(2, 2, bias=False).named_parameters(), weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [1]


def adamw_by_its_formula(p: float, gradients: list[float], config: AdamWConfig) -> float:
    m = v = 0.0
    (b1, b2), lr = config.betas, config.lr
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + config.eps)
        p -= lr * (step + config.weight_decay * p)
    return p


@pytest.mark.parametrize("eps", [1e-8, 1e-15])
def test_three_updates_follow_the_formula_even_for_gradients_below_the_usual_eps(eps) -> None:
    config = AdamWConfig(lr=0.1, eps=eps)
    gradients = [1e-12, -3e-13, 2e-12]
    exact = torch.tensor(adamw_by_its_formula(1.0, gradients, config), dtype=torch.float64)
    weights = {}
    for fused in (True, False):
        weight = nn.Parameter(torch.ones(1, 1))
        optimizer = build_adamw([("w", weight)], config)
        if not fused:
            optimizer = torch.optim.AdamW(
                [weight], lr=0.1, betas=config.betas, eps=eps, weight_decay=0.1, foreach=False
            )
        for g in gradients:
            weight.grad = torch.full((1, 1), g)
            optimizer.step()
        weights[fused] = weight.detach()[0, 0]
    check_error("weight", weights[True], weights[False], exact)


def test_a_small_eps_moves_what_the_usual_one_leaves_alone() -> None:
    config = AdamWConfig(lr=0.1, eps=1e-15, weight_decay=0.0)
    assert adamw_by_its_formula(1.0, [1e-12], config) < 0.901
    assert adamw_by_its_formula(1.0, [1e-12], config.model_copy(update={"eps": 1e-8})) > 0.999


def test_moments_exist_before_the_first_step_as_torch_would_create_them() -> None:
    ours, theirs = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    config = AdamWConfig(lr=0.1)
    optimizers = [
        build_adamw([("w", ours)], config),
        torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    ]
    assert {n: x.abs().sum().item() for n, x in optimizers[0].state[ours].items()} == {
        "step": 0.0,
        "exp_avg": 0.0,
        "exp_avg_sq": 0.0,
    }
    for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
        weight.grad = torch.full((2, 3), 0.5)
        optimizer.step()
    assert torch.equal(ours, theirs)
    for name, value in optimizers[1].state[theirs].items():
        assert torch.equal(optimizers[0].state[ours][name], value), name


def test_defaults_are_the_systems() -> None:
    config = AdamWConfig(lr=1e-3)
    assert (config.betas, config.eps, config.weight_decay) == ((0.9, 0.95), 1e-8, 0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, r"lr must be valid: .*greater than 0, got 0\.0"),
        ({"lr": 0.1, "betas": [0.9, 1.0]}, r"betas\.1 must be valid: .*less than 1, got 1\.0"),
        ({"lr": 0.1, "weight_decai": 0.1}, "did you mean weight_decay"),
    ],
)
def test_a_setting_out_of_range_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(AdamWConfig, values, "test")
