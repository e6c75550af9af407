"""Linear, RMSNorm and the rotation, each against its formula."""

import pytest
import torch

from sevenfold.models.layers import Linear, RMSNorm, rotate, rotation
from sevenfold.ops.testing import check_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
POSITIONS = torch.tensor([[0, 1, 2, 500], [7, 8, 1000, 3]])


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().to(dtype)


def turned(x: torch.Tensor, rotary_dim: int, theta: float) -> torch.Tensor:
    """The rotation in complex numbers: channel i and i + r/2 are one number, times e^(i angle)."""
    r, wide = rotary_dim, torch.complex128
    pairs = torch.complex(x[..., : r // 2].double(), x[..., r // 2 : r].double())
    rates = torch.tensor([theta ** (-2 * i / r) for i in range(r // 2)], dtype=torch.float64)
    angle = (POSITIONS[..., None] * rates)[:, :, None]
    y = pairs * torch.exp(1j * angle.to(wide))
    return torch.cat([y.real, y.imag, x[..., r:].double()], dim=-1)


def turn(x: torch.Tensor, positions: torch.Tensor, rotary_dim: int, theta: float) -> torch.Tensor:
    return rotate(x, rotation(positions, rotary_dim, theta, dtype=x.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [2, 4, 8])
@pytest.mark.parametrize("theta", [1e4, 1e7])
def test_rotation_is_a_complex_product(rotary_dim: int, theta: float, dtype: torch.dtype) -> None:
    x = random(2, 4, 3, 8, dtype=dtype)
    exact = turned(x, rotary_dim, theta)
    found = turn(x, POSITIONS, rotary_dim, theta)
    assert found.dtype == dtype
    check_error("y", found, honest_rotation(x, rotary_dim, theta), exact)


def honest_rotation(x: torch.Tensor, rotary_dim: int, theta: float) -> torch.Tensor:
    """Rotation matrices, with angles in fp32 at least, as published models have them."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    r, half = rotary_dim, rotary_dim // 2
    rates = (1 / theta ** (torch.arange(half) * 2 / r)).to(dtype)
    angle = POSITIONS[..., None].to(dtype) * rates
    matrix = torch.eye(x.shape[-1], dtype=dtype).repeat(*POSITIONS.shape, 1, 1)
    for i in range(half):
        c, s = angle[..., i].cos(), angle[..., i].sin()
        matrix[..., i, i], matrix[..., i + half, i + half] = c, c
        matrix[..., i, i + half], matrix[..., i + half, i] = -s, s
    return torch.einsum("btij,bthj->bthi", matrix, x.to(dtype)).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_other_channels_pass_untouched(dtype: torch.dtype) -> None:
    x = random(2, 4, 3, 8, dtype=dtype)
    y = turn(x, POSITIONS, 4, 1e4)
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert torch.equal(y[0, 0], x[0, 0])  # position 0
    assert not bool((y[1, :, :, :2] == x[1, :, :, :2]).any())
    assert torch.equal(turn(x, POSITIONS, 0, 1e4), x)


def test_scores_depend_on_the_distance_only() -> None:
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=1)

    def score(i: int, j: int) -> torch.Tensor:
        places = (torch.tensor([[n]]) for n in (i, j))
        return (turn(q, next(places), 8, 1e4) * turn(k, next(places), 8, 1e4)).sum()

    near, far, other = score(5, 3), score(105, 103), score(5, 4)
    check_error("score", far, score(1005, 1003), near)
    assert abs(other - near) > abs(far - near)


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_its_formula(dtype: torch.dtype) -> None:
    norm = RMSNorm(8, eps=1e-5)
    norm.weight.data = random(8, seed=1).float()
    norm = norm.to(dtype).requires_grad_(False)
    x = random(3, 2, 8, dtype=dtype)
    y = norm(x)
    assert y.dtype == dtype
    honest = formula(x.float(), norm.weight.float(), 1e-5).to(dtype)
    if dtype == torch.float64:
        honest = formula(x, norm.weight, 1e-5)
    check_error("y", y, honest, formula(x.double(), norm.weight.double(), 1e-5))


def test_rms_norm_counts_eps_and_starts_at_one() -> None:
    norm = RMSNorm(4, eps=9.0)
    assert torch.equal(norm.weight, torch.ones(4))
    assert torch.equal(norm(torch.full((1, 4), 4.0)), torch.full((1, 4), 0.8))  # 4 / sqrt(16 + 9)


def test_rms_norm_of_large_fp16_values_does_not_overflow() -> None:
    y = RMSNorm(4, eps=1e-5).half()(torch.full((1, 4), 1e4, dtype=torch.float16))
    assert torch.equal(y, torch.ones(1, 4, dtype=torch.float16))


def test_linear_has_no_bias() -> None:
    layer = Linear(3, 2)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]])
    assert torch.equal(layer(torch.tensor([[1.0, 1.0, 2.0]])), torch.tensor([[9.0, 1.0]]))
