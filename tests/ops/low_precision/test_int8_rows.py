"""int8 with a scale a row: its error, that it rounds once, and what is no number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.ops import dequantise_rows, int8_linear, linear, quantise_rows


def rows(seed: int, exponent: int, shape: tuple[int, ...] = (3, 5, 16)) -> torch.Tensor:
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return draw * 2.0**exponent


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-60, 60))
def test_the_error_is_half_a_step_at_most(seed: int, exponent: int) -> None:
    x = rows(seed, exponent)
    codes, scale = quantise_rows(x)
    # The peak over 127, and the rounding of scale to 17 bits.
    step = x.abs().amax(-1).double() / 127 * (1 + 2**-16)
    assert (scale <= step).all()
    error = (dequantise_rows(codes, scale).double() - x.double()).abs()
    assert (error <= step[..., None] / 2).all()
    assert (codes.abs().amax(-1) == 127).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-60, 60))
def test_what_was_quantised_once_comes_back_bit_for_bit(seed: int, exponent: int) -> None:
    once = quantise_rows(rows(seed, exponent))
    again = quantise_rows(dequantise_rows(*once))
    assert torch.equal(once.codes, again.codes)
    assert torch.equal(once.scale, again.scale)


def test_zeros_and_what_is_no_number() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")], [1e-45, 0.0]])
    codes, scale = quantise_rows(x)
    back = dequantise_rows(codes, scale)
    assert torch.equal(back[0], torch.zeros(2))
    assert back[1:3].isnan().any(-1).all()
    assert back[3].isfinite().all()
    with pytest.raises(TypeError, match=r"x must be torch.float32 or .*, got torch.float64"):
        quantise_rows(torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_that_of_the_dequantised_weight(dtype: torch.dtype) -> None:
    weight, x = rows(0, 0, (7, 16)), rows(1, 0, (2, 3, 16)).to(dtype)
    codes, scale = quantise_rows(weight)
    got = int8_linear(x, codes, scale)
    assert got.dtype is dtype
    assert torch.equal(got, linear(x, (codes * scale[:, None]).to(dtype)))
    with pytest.raises(
        ValueError, match=r"x must have shape \[..., K\] = \[2, 16\], got \[2, 15\]"
    ):
        int8_linear(torch.zeros(2, 15), codes, scale)
    with pytest.raises(TypeError, match=r"codes must be torch.int8, got torch.float32"):
        int8_linear(x, weight, scale)
