"""Products with 8-bit weights: what they mean, which way they go, what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.config import UnsupportedError
from sevenfold.ops import (
    Fp8Rows,
    Impl,
    dequantise_rows,
    fp8_linear,
    fp8_mixture,
    int8_linear,
    int8_mixture,
    plan_dispatch,
    quantise_rows,
    quantise_rows_fp8,
)
from sevenfold.ops.quantised import default_fp8_impl, default_int8_impl, rule
from sevenfold.ops.testing import check_error

FP8 = torch.float8_e4m3fn


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-60, 60))
def test_fp8_rounds_each_element_by_a_sixteenth_at_most(seed: int, exponent: int) -> None:
    x = random(3, 5, 16, seed=seed) * 2.0**exponent
    codes, scale = quantise_rows_fp8(x)
    error = (codes.double() * scale.double()[..., None] - x.double()).abs()
    # fp32's own rounding of the quotient and the scale besides.
    bound = torch.maximum(x.abs().double() / 16, scale[..., None].double() * 2**-10)
    assert (error <= bound * (1 + 2**-20)).all()
    assert (codes.float().abs().amax(-1) == 448).all()


def test_fp8_of_zeros_and_of_what_is_no_number() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]])
    codes, scale = quantise_rows_fp8(x)
    back = codes.float() * scale[:, None]
    assert torch.equal(back[0], torch.zeros(2))
    assert back[1:].isnan().any(-1).all()
    with pytest.raises(TypeError, match=r"x must be torch.float32 or .*, got torch.float64"):
        quantise_rows_fp8(torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_product_is_that_of_both_sides_rounded(dtype: torch.dtype) -> None:
    x, (codes, scale) = (
        random(2, 3, 48, seed=0).to(dtype),
        quantise_rows_fp8(random(32, 48, seed=1)),
    )
    rows, row_scale = quantise_rows_fp8(x)
    sides = (
        rows.double() * row_scale.double()[..., None],
        codes.double() * scale.double()[:, None],
    )
    exact = sides[0] @ sides[1].T
    single = (sides[0].float() @ sides[1].float().T).to(dtype)
    check_error("y", fp8_linear(x, codes, scale), single, exact)
    if dtype is torch.bfloat16:
        check_error("y", fp8_linear(x, codes, scale, impl="scaled_mm"), single, exact)


def test_fp8_mixture_is_its_experts_products() -> None:
    x, weights = random(7, 16, seed=0), random(7, 2, seed=1).abs()
    experts = torch.tensor([[0, 2]] * 3 + [[2, 3]] * 4)
    gate_up, down = (quantise_rows_fp8(random(4, *size, seed=n))
                     for n, size in enumerate([(24, 16), (16, 12)]))  # fmt: skip
    found = fp8_mixture(x, weights, gate_up, down, plan_dispatch(experts, 4, None))
    for t in range(7):
        total = torch.zeros(16)
        for j, e in enumerate(experts[t].tolist()):
            gate, up = fp8_linear(x[t : t + 1], gate_up.codes[e], gate_up.scale[e]).chunk(2, -1)
            hidden = torch.nn.functional.silu(gate) * up
            total += weights[t, j] * fp8_linear(hidden, down.codes[e], down.scale[e])[0]
        check_error("y", found[t], total, total.double())


def test_the_way_of_a_product_depends_on_its_rows() -> None:
    ways = [rule.product_path(rows) for rows in (0, 1, 64, 65, 512, 513, 10**6)]
    assert ways == ["few", "few", "few", "tile", "tile", "scratch", "scratch"]
    tiles = [rule.tile_rows(rows) for rows in (0, 1, 16, 17, 32, 33, 64, 65, 4096)]
    assert tiles == [16, 16, 16, 32, 32, 64, 64, 128, 128]
    cpu = torch.device("cpu")
    assert rule.linear_tile(1, 4096, cpu).BM == 16
    assert rule.linear_tile(1, 4096, cpu) != rule.linear_tile(1, 4097, cpu)
    # Twice an expert's even share: 128 rows of 8 experts are 16 each.
    assert [tile.BM for tile in rule.expert_tiles(128, 8, cpu)] == [32, 32]
    assert [tile.BM for tile in rule.expert_tiles(2, 8, cpu)] == [16, 16]


class OnGpu(torch.Tensor):
    """A tensor of a shape and dtype that says that it lies on a GPU."""

    device = torch.device("cuda")  # pyright: ignore[reportAssignmentType]


def on_gpu(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(rows, 64, dtype=dtype).as_subclass(OnGpu)


def test_defaults() -> None:
    codes = torch.zeros(32, 64, dtype=FP8)
    for dtype, impl in ((torch.float32, Impl.EAGER), (torch.float16, Impl.TRITON)):
        assert default_int8_impl(on_gpu(3, dtype)) is impl
        assert default_fp8_impl(on_gpu(3, dtype), codes) is impl
        assert default_fp8_impl(on_gpu(65, dtype), codes) is impl
    assert default_int8_impl(torch.zeros(3, 64).bfloat16()) is Impl.EAGER
    assert default_fp8_impl(on_gpu(64, torch.bfloat16), codes) is Impl.TRITON
    assert default_fp8_impl(on_gpu(65, torch.bfloat16), codes) is Impl.SCALED_MM
    assert default_fp8_impl(on_gpu(65, torch.bfloat16), codes[:31]) is Impl.TRITON


def test_a_named_implementation_never_falls_back() -> None:
    x, held = random(2, 16, seed=0), quantise_rows(random(16, 16, seed=1))
    low = quantise_rows_fp8(random(16, 16, seed=1))
    message = "x must be bf16 or fp16 on a GPU for impl triton, got torch.float32 on cpu"
    plan, stacked = plan_dispatch(torch.tensor([[0], [0]]), 1, None), [h[None] for h in held]
    experts = type(held)(*stacked)
    calls = [
        lambda: int8_linear(x, *held, impl="triton"),
        lambda: fp8_linear(x, *low, impl="triton"),
        lambda: int8_mixture(x, x[:, :1], quantise_rows(random(1, 32, 16, seed=2)), experts, plan,
                             impl="triton"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(UnsupportedError, match=message):
            call()
    with pytest.raises(UnsupportedError, match="x must be bf16, and N and K multiples of 16, for"):
        fp8_linear(x, *low, impl="scaled_mm")
    with pytest.raises(UnsupportedError, match="int8_linear must use impl eager, triton, got 'num"):
        int8_linear(x, *held, impl="numba")
    with pytest.raises(TypeError, match=r"codes must be torch.float8_e4m3fn, got torch.int8"):
        fp8_linear(x, *held)
    with pytest.raises(TypeError, match=r"codes must be torch.int8, got torch.float8_e4m3fn"):
        int8_linear(x, *low)
    with pytest.raises(
        TypeError, match=r"gate_up_proj.codes must be torch.float8_e4m3fn, got torc"
    ):
        fp8_mixture(x, x[:, :1], Fp8Rows(*quantise_rows(random(1, 32, 16, seed=2))),
                    Fp8Rows(low.codes[None], low.scale[None]), plan)  # fmt: skip


def test_int8_means_the_dequantised_weight() -> None:
    x, held = random(3, 16, seed=0), quantise_rows(random(5, 16, seed=1))
    single = x @ dequantise_rows(*held).T
    exact = x.double() @ (held.codes.double() * held.scale.double()[:, None]).T
    check_error("y", int8_linear(x, *held), single, exact)
