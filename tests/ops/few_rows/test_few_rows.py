"""Half a layer of a few tokens: the error rule against the formula in fp64, row by row."""

import pytest
import torch
from torch.nn import functional as F

from sevenfold.ops import (
    DenseRows,
    ExpertRows,
    LightningRows,
    LightningWeights,
    Norm,
    Residual,
    head_slopes,
    suits_few_rows,
)
from sevenfold.ops.testing import check_error, poisoned_allocations

H, K, V, D, F_, E = 3, 5, 5, 12, 7, 4
RESIDUALS = [Residual(1.0, 1.0, False), Residual(3.5, 0.75, True)]


def lightning_rows(x, norm, weights, residual, state):
    return LightningRows(norm, weights, residual)(x, state)


def expert_rows(x, *weights, num_chosen):
    return ExpertRows(*weights, num_chosen=num_chosen)(x)


def dense_rows(x, *weights):
    return DenseRows(*weights)(x)


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().double()


def rms(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)


def join(x: torch.Tensor, u: torch.Tensor, f: torch.Tensor, residual: Residual) -> torch.Tensor:
    return residual.alpha * (u if residual.post_norm else x) + residual.beta * f


def lightning_formula(x, norm, weights, residual, state):
    u = rms(x, norm)
    qkv = F.silu(u @ weights.qkv.T).view(len(x), H, 2 * K + V)
    q, k, v = qkv.split([K, K, V], -1)
    decay = weights.log_decay.to(x.dtype).exp()[:, None, None]
    state = decay * state + k[..., None] * v[..., None, :]
    o = torch.einsum("nhk,nhkv->nhv", q, state).flatten(1)
    gated = rms(o, weights.norm) * torch.sigmoid(u @ weights.gate.T)
    return join(x, u, gated @ weights.out.T, residual), state


def glu(u, gate_up, down):
    gate, up = (u @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def experts_formula(x, norm, router, gate_up, down, residual, *, num_chosen):
    u = rms(x, norm)
    shares, chosen = (u @ router.T).softmax(-1).topk(num_chosen)
    shares = shares / shares.sum(-1, keepdim=True)
    fed = [
        sum(shares[n, j] * glu(u[n], gate_up[e], down[e]) for j, e in enumerate(chosen[n]))
        for n in range(len(x))
    ]
    return join(x, u, torch.stack(fed), residual)


def lightning_case(N: int, residual: Residual, dtype: torch.dtype) -> tuple:
    weights = LightningWeights(
        random(H * (2 * K + V), D, seed=1).to(dtype),
        random(H * V, D, seed=2).to(dtype),
        Norm(random(H * V, seed=3).to(dtype), 1e-6),
        random(D, H * V, seed=4).to(dtype),
        -torch.tensor(head_slopes(H)),
    )
    norm = Norm(random(D, seed=5).to(dtype), 1e-5)
    x, state = random(N, D, seed=6).to(dtype), random(N, H, K, V, seed=7).to(dtype)
    return x, norm, weights, residual, state


def experts_case(N: int, residual: Residual, dtype: torch.dtype) -> tuple:
    norm = Norm(random(D, seed=5).to(dtype), 1e-5)
    shapes = [(E, D), (E, 2 * F_, D), (E, D, F_)]
    weights = [random(*shape, seed=10 + i).to(dtype) for i, shape in enumerate(shapes)]
    return random(N, D, seed=6).to(dtype), norm, *weights, residual


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("N", [1, 2, 8])
def test_lightning_rows(N: int, residual: Residual) -> None:
    case = lightning_case(N, residual, torch.float32)
    before = case[-1].clone()
    with torch.no_grad(), poisoned_allocations():
        found = lightning_rows(*case)
    assert torch.equal(case[-1], before), "the state that goes in stays as it is"
    honest = lightning_formula(*case)
    exact = lightning_formula(*lightning_case(N, residual, torch.float64))
    for name, *three in zip(("y", "state"), found, honest, exact, strict=True):
        check_error(name, *three)


def test_a_state_that_is_advanced_in_place_is_the_state_after() -> None:
    x, norm, weights, residual, state = lightning_case(3, RESIDUALS[1], torch.float32)
    rows = LightningRows(norm, weights, residual)
    with torch.no_grad():
        y, after = rows(x, state)
        found = rows.advance(x, state)
    assert torch.equal(found, y)
    assert torch.equal(state, after)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(("N", "num_chosen"), [(1, 1), (1, 4), (3, 2), (8, 3)])
def test_expert_rows(N: int, num_chosen: int, residual: Residual) -> None:
    case = experts_case(N, residual, torch.float32)
    with torch.no_grad(), poisoned_allocations():
        y = expert_rows(*case, num_chosen=num_chosen)
    honest = experts_formula(*case, num_chosen=num_chosen)
    exact_case = experts_case(N, residual, torch.float64)
    check_error("y", y, honest, experts_formula(*exact_case, num_chosen=num_chosen))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("N", [1, 5])
def test_dense_rows(N: int, residual: Residual) -> None:
    def case(dtype: torch.dtype) -> tuple:
        x, norm, _, gate_up, down, _ = experts_case(N, residual, dtype)
        return x, norm, gate_up[0], down[0]

    def formula(x, norm, gate_up, down):
        u = rms(x, norm)
        return join(x, u, glu(u, gate_up, down), residual)

    with torch.no_grad(), poisoned_allocations():
        y = dense_rows(*case(torch.float32), residual)
    check_error("y", y, formula(*case(torch.float32)), formula(*case(torch.float64)))


def test_a_row_that_is_not_finite_stays_alone() -> None:
    x, *rest = lightning_case(3, RESIDUALS[1], torch.float32)
    y, state = lightning_rows(x, *rest)
    bad = x.clone()
    bad[1, 0] = float("nan")
    y_bad, state_bad = lightning_rows(bad, *rest)
    assert torch.equal(y_bad[::2], y[::2])
    assert torch.equal(state_bad[::2], state[::2])
    assert y_bad[1].isnan().all()
    x, *rest = experts_case(3, RESIDUALS[0], torch.float32)
    bad = x.clone()
    bad[1, 0] = float("inf")
    y, y_bad = (expert_rows(rows, *rest, num_chosen=2) for rows in (x, bad))
    assert torch.equal(y_bad[::2], y[::2])
    assert not y_bad[1].isfinite().all()


def test_weights_are_read_where_they_lie() -> None:
    x, norm, router, gate_up, down, residual = experts_case(2, RESIDUALS[0], torch.float32)
    rows = ExpertRows(norm, router, gate_up, down, residual, num_chosen=2)
    before = rows(x)
    down.mul_(2)
    assert torch.equal(rows(x), expert_rows(x, norm, router, gate_up, down, residual, num_chosen=2))
    assert not torch.equal(rows(x), before)
    with pytest.raises(ValueError, match=r"weights must be contiguous, got strides \["):
        ExpertRows(norm, router, gate_up, down.mT.contiguous().mT, residual, num_chosen=2)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(num_threads: int) -> None:
    case = experts_case(4, RESIDUALS[0], torch.float32)
    y = expert_rows(*case, num_chosen=2)
    usual = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(expert_rows(*case, num_chosen=2), y)
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize(
    ("x", "suits"),
    [
        (torch.zeros(8, 2), True),
        (torch.zeros(1, 1, 2, dtype=torch.float64), True),
        (torch.zeros(9, 2), False),
        (torch.zeros(0, 2), False),
        (torch.zeros(1, 2, dtype=torch.bfloat16), False),
        (torch.zeros(1, 2, device="meta"), False),
    ],
)
def test_what_suits(x: torch.Tensor, suits: bool) -> None:
    with torch.no_grad():
        assert suits_few_rows(x) is suits
        with torch.autocast("cpu", torch.bfloat16):
            assert not suits_few_rows(x)
    assert not suits_few_rows(x)
