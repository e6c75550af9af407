"""fp16 under a power of two: its error, its range, that it rounds once, and unbiased noise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.ops import Noise, from_scaled_fp16, noise_bits, to_scaled_fp16

UNIT = 2.0**-11  # half the spacing of 11 significant bits


def matrices(seed: int, exponent: int) -> torch.Tensor:
    draw = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return draw * 2.0**exponent


def bits_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2**32, shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-90, 90), noisy=st.booleans())
def test_the_error_is_relative_and_nothing_overflows(seed, exponent, noisy) -> None:
    x = matrices(seed, exponent)
    codes, scale = to_scaled_fp16(x, bits_of(seed, *x.shape) if noisy else None)
    assert codes.isfinite().all()
    assert (torch.frexp(scale).mantissa == 0.5).all()
    error = (from_scaled_fp16(codes, scale).double() - x.double()).abs()
    floor = 2.0**-24 * scale.double()[..., None, None]
    assert (error <= UNIT * (1 + noisy) * x.double().abs() + floor).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-90, 90))
def test_what_was_rounded_once_comes_back_bit_for_bit(seed: int, exponent: int) -> None:
    once = to_scaled_fp16(matrices(seed, exponent))
    for bits in (None, bits_of(seed, 4, 3, 8, 8)):
        again = to_scaled_fp16(from_scaled_fp16(*once), bits)
        assert torch.equal(once.codes, again.codes)
        assert torch.equal(once.scale, again.scale)


def test_a_peak_that_rounds_up_to_a_power_of_two_does_so_once() -> None:
    x = torch.full((1, 1), 2.0 - 2.0**-20)
    once = to_scaled_fp16(x)
    assert from_scaled_fp16(*once) == 2
    assert torch.equal(to_scaled_fp16(from_scaled_fp16(*once)).scale, once.scale)


def test_zeros_and_what_is_no_number() -> None:
    x = torch.zeros(3, 2, 2)
    x[1, 0, 0], x[2, 0, 0] = float("nan"), float("inf")
    for bits in (None, torch.full(x.shape, 0x1FFF)):
        back = from_scaled_fp16(*to_scaled_fp16(x, bits))
        assert torch.equal(back[0], torch.zeros(2, 2))
        assert back[1, 0, 0].isnan()
        assert back[2, 0, 0].isinf()
    with pytest.raises(TypeError, match=r"x must be torch.float32, got torch.float16"):
        to_scaled_fp16(x.half())
    with pytest.raises(ValueError, match=r"bits must have shape \[..., K, V\] = \[3, 2, 2\]"):
        to_scaled_fp16(x, torch.zeros(2, 2, dtype=torch.int64))


def test_stochastic_rounding_has_the_number_as_its_mean() -> None:
    """Within five standard errors, at several places between two neighbours and in two binades."""
    num_draws, spacing = 20_000, 2.0**-10
    share = torch.tensor([0.0, 0.013, 0.25, 0.5, 0.77, 0.999])
    for base in (1.0, -1.75):
        wanted = (base + spacing * share).view(1, 1, -1)
        # A larger element beside them, so that all share one scale.
        x = torch.cat([wanted, torch.full((1, 1, 1), 1.999)], -1).expand(num_draws, -1, -1)
        noise = Noise(torch.full((num_draws,), 7), torch.arange(num_draws), 3)
        got = from_scaled_fp16(*to_scaled_fp16(x.contiguous(), noise_bits(noise, (1, 7))))
        got = got[:, 0, :-1].double()
        assert all(len(column.unique()) <= 2 for column in got.T)
        error = (got.mean(0) - wanted[0, 0].double()).abs()
        deviation = spacing * (share * (1 - share)).sqrt().double() / num_draws**0.5
        # 13 bits of noise know a share to 2^-13 only, and fp32 the number itself to 2^-24.
        assert (error <= 5 * deviation + spacing * 2**-13).all()


def test_what_is_added_in_small_terms_survives() -> None:
    """A sum of terms of 2^-13 of it: lost by rounding to nearest, kept stochastically."""
    num_terms, term = 4096, 2.0**-13
    nearest = noisy = torch.ones(1, 16, 16)
    for step in range(num_terms):
        noise = Noise(torch.tensor([0]), torch.tensor([step]), 0)
        bits = noise_bits(noise, (16, 16))
        nearest = from_scaled_fp16(*to_scaled_fp16(nearest + term))
        noisy = from_scaled_fp16(*to_scaled_fp16(noisy + term, bits))
    assert torch.equal(nearest, torch.ones(1, 16, 16))
    # The variance of one rounding is at most a quarter of the spacing 2^-10 squared.
    deviation = 2.0**-11 * num_terms**0.5 / 16
    assert abs(float(noisy.mean()) - (1 + num_terms * term)) <= 5 * deviation
