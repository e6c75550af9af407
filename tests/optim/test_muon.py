"""Muon against its statement, matrix by matrix, in fp64; groups by name."""

import math

import pytest
import torch
from torch import Tensor, nn

from sevenfold.config import ConfigError, parse_config
from sevenfold.ops.testing import check_error
from sevenfold.optim import (
    AdamWConfig,
    GroupConfig,
    OptimizerConfig,
    build_adamw,
    build_optimizer,
    muon,
    orthogonalized,
    parameter_groups,
)
from sevenfold.optim.orthogonal import COEFFICIENTS

SHAPES = {
    "embed_tokens.weight": (7, 4),
    "layers.0.norm.weight": (4,),
    "layers.0.wide.weight": (3, 6),
    "layers.0.tall.weight": (6, 3),
    "layers.1.wide.weight": (3, 6),
    "layers.1.experts.down_proj": (5, 3, 6),
    "lm_head.weight": (7, 4),
}
CONFIG = OptimizerConfig(lr=0.05, kind="muon", weight_decay=0.3)


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(random(shape, i).to(dtype))
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def stated_orthogonalisation(x: Tensor) -> Tensor:
    """The quintic on the singular values of one matrix."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / x.double().norm()
    for _ in range(5):
        a, b, c = COEFFICIENTS
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


def stated_update(weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Three lines a step, one matrix."""
    B = torch.zeros_like(weight)
    for G in gradients:
        B = 0.95 * B + 0.05 * G
        O = stated_orthogonalisation(0.05 * G + 0.95 * B)
        weight = weight - lr * (0.2 * math.sqrt(max(weight.shape)) * O + decay * weight)
    return weight


@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (4, 4), (2, 5, 3), (1, 7)])
def test_singular_vectors_stay_and_values_follow_the_quintic(shape: tuple[int, ...]) -> None:
    x = random(shape, 1)
    matrices = x.reshape(-1, *shape[-2:])
    exact = torch.stack([stated_orthogonalisation(m) for m in matrices]).reshape(shape)
    single = orthogonalized(x.float()).double()
    check_error("fp64", orthogonalized(x), single.float(), exact)
    values = torch.linalg.svdvals(orthogonalized(x))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_gradient_of_nothing_moves_nothing() -> None:
    assert torch.equal(orthogonalized(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("batch_elements", [1, 20, 2**27])
def test_three_steps_are_the_statements(batch_elements: int, monkeypatch) -> None:
    monkeypatch.setattr(muon, "_BATCH_ELEMENTS", batch_elements)
    moved, plain = weights(), weights(torch.float32)
    optimizers = [build_optimizer(w.items(), CONFIG) for w in (moved, plain)]
    gradients = {
        name: [random(shape, 10 * i + t) for t in range(3)]
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    for t in range(3):
        for named, optimizer in zip((moved, plain), optimizers, strict=True):
            for name, parameter in named.items():
                parameter.grad = gradients[name][t].to(parameter.dtype)
            optimizer.step()
    before = weights()
    for name in ("layers.0.wide.weight", "layers.0.tall.weight", "layers.1.wide.weight"):
        exact = stated_update(before[name].detach(), gradients[name], 0.05, 0.3)
        check_error(name, moved[name].detach(), plain[name].detach(), exact)
    name = "layers.1.experts.down_proj"
    for e in range(5):
        of_expert = [g[e] for g in gradients[name]]
        exact = stated_update(before[name][e].detach(), of_expert, 0.05, 0.3)
        check_error(f"{name} {e}", moved[name][e].detach(), plain[name][e].detach(), exact)
    # All others are AdamW's, bit for bit.
    rest = {n: p for n, p in weights().items() if n.startswith(("embed", "lm_head")) or "norm" in n}
    adamw = build_adamw(rest.items(), AdamWConfig(lr=0.05, weight_decay=0.3))
    for t in range(3):
        for name, parameter in rest.items():
            parameter.grad = gradients[name][t]
        adamw.step()
    assert len(rest) == 3
    assert [name for name, p in rest.items() if not torch.equal(p, moved[name])] == []


def test_one_rate_reaches_all_and_the_state_is_there_before_the_first_step() -> None:
    named = weights()
    optimizer = build_optimizer(named.items(), CONFIG)
    assert set(optimizer.state[named["layers.0.tall.weight"]]) == {"momentum"}
    assert set(optimizer.state[named["lm_head.weight"]]) == {"step", "exp_avg", "exp_avg_sq"}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [n for n, p in weights().items() if not torch.equal(p, named[n])] == []
    with pytest.raises(ValueError, match="closure must be None"):
        optimizer.step(lambda: 0.0)


def settings(groups: list) -> dict[str, tuple]:
    named = weights()
    found = parameter_groups(
        named.items(), weight_decay=0.1, kind="muon", groups=[GroupConfig(**g) for g in groups]
    )
    of = {id(p): (g["kind"], g["weight_decay"], g["lr_factor"]) for g in found for p in g["params"]}
    return {name: of[id(p)] for name, p in named.items()}


def test_groups_by_name_change_what_they_name_and_nothing_else() -> None:
    plain = settings([])
    assert plain["layers.0.wide.weight"] == ("muon", 0.1, 1.0)
    assert plain["layers.1.experts.down_proj"] == ("muon", 0.1, 1.0)
    assert plain["layers.0.norm.weight"] == ("adamw", 0.0, 1.0)
    assert plain["embed_tokens.weight"] == plain["lm_head.weight"] == ("adamw", 0.1, 1.0)
    changed = settings(
        [
            {"names": ("layers.0.tall.*",), "kind": "adamw"},
            {"names": ("layers.0.*", "lm_head.*"), "lr_factor": 0.5, "weight_decay": 0.0},
        ]
    )
    assert changed.pop("layers.0.tall.weight") == ("adamw", 0.1, 1.0)
    assert changed.pop("layers.0.wide.weight") == ("muon", 0.0, 0.5)
    assert changed.pop("layers.0.norm.weight") == ("adamw", 0.0, 0.5)
    assert changed.pop("lm_head.weight") == ("adamw", 0.0, 0.5)
    assert changed == {name: plain[name] for name in changed}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"momentum": 0.9}, "momentum must be left out with kind = 'adamw'"),
        ({"groups": [{"names": ["a"], "kind": "adamw"}]}, "groups must have no kind with kind ="),
        ({"groups": [{"names": ["a"]}]}, "groups must change something, got only names"),
        ({"kind": "moun"}, "kind must be"),
    ],
)
def test_settings_without_effect_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(OptimizerConfig, {"lr": 0.1} | values, "test")


def test_a_group_of_nothing_is_refused() -> None:
    groups = ({"names": ("layers.9.*",), "lr_factor": 0.5},)
    with pytest.raises(ConfigError, match=r"groups must name parameters .* none for \['layers\.9"):
        settings(list(groups))
