"""Decoding over states in fp16 and int8: the kernels, on a GPU or under Triton's interpreter."""

import pytest
import torch
from decode_cases import gaps, spread
from int8_cases import H, Int8Course, S
from kernel_device import DEVICE, DTYPES, GPU_UNLESS_INTERPRETED, INTERPRETED
from lightning_statements import DECAYS
from torch import Tensor

from sevenfold.ops import (
    Noise,
    ScaledFp16,
    from_scaled_fp16,
    lightning_attention_decode_fp16,
    lightning_attention_replay_int8,
    to_scaled_fp16,
)
from sevenfold.ops.testing import check_error

pytestmark = [
    *GPU_UNLESS_INTERPRETED,
    pytest.mark.filterwarnings("ignore:.*has no tuning"),
]
WIDTHS = [(16, 24)] if INTERPRETED else [(64, 64), (96, 96), (128, 128), (256, 256), (128, 64)]


def decay() -> Tensor:
    return torch.tensor(DECAYS["mixed"], device=DEVICE)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


def noise(B: int, step: int) -> Noise:
    key = torch.tensor([5, -(2**61), 2**40 + 3][:B], device=DEVICE)
    return Noise(key, torch.arange(B, device=DEVICE) + step, 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_fp16_states_lie_within_a_rounding_of_the_recurrence(
    K: int, V: int, dtype: torch.dtype
) -> None:
    held = to_scaled_fp16(randn(S, H, K, V, seed=0) * 100)
    pool = ScaledFp16(spread(held.codes), spread(held.scale))
    slots = torch.tensor([2, -1, 0], device=DEVICE, dtype=torch.int32)
    for step in range(3):
        q, k, v = (randn(3, H, w, seed=3 * step + n, dtype=dtype) for n, w in enumerate((K, K, V)))
        before = from_scaled_fp16(*pool)[[2, 0]].double()
        other = ScaledFp16(*(x.clone() for x in pool))
        args = (q, k, v, decay())
        eager = lightning_attention_decode_fp16(
            *args, other, slots, noise(3, step), scale=0.5, impl="eager"
        )
        found = lightning_attention_decode_fp16(
            *args, pool, slots, noise(3, step), scale=0.5, impl="triton"
        )
        kv = k[::2, :, :, None].double() * v[::2, :, None].double()
        exact = decay().double().exp()[:, None, None] * before + kv
        wanted = 0.5 * torch.einsum("bhk,bhkv->bhv", q[::2].double(), exact)
        check_error("o", found[::2], eager[::2], wanted)
        assert not found[1].any()
        after = from_scaled_fp16(*pool)[[2, 0]].double()
        peak = exact.abs().amax((-2, -1), keepdim=True)
        # to_scaled_fp16's bound, and fp32's own rounding before it.
        assert bool(
            ((after - exact).abs() <= 2**-10 * (1 + 2**-9) * exact.abs() + 2**-22 * peak).all()
        )
    assert torch.equal(pool.codes[1], held.codes[1])
    assert bool((gaps(pool.codes) == 7).all())
    assert bool((gaps(pool.scale) == 7).all())


def test_fp16_rounds_by_the_same_bits_as_the_eager_form() -> None:
    """Whole numbers whose sums fp32 holds and fp16 does not."""
    K, V, zero = *WIDTHS[0], torch.zeros(H, device=DEVICE)
    held = to_scaled_fp16((randn(S, H, K, V, seed=0) * 500).round())
    slots = torch.tensor([1, 2], device=DEVICE)
    pools = [ScaledFp16(*(x.clone() for x in held)) for _ in range(2)]
    for step in range(3):
        q, k, v = (randn(2, H, w, seed=step + n).mul(60).round() for n, w in enumerate((K, K, V)))
        for pool, impl in zip(pools, ("triton", "eager"), strict=True):
            lightning_attention_decode_fp16(q, k, v, zero, pool, slots, noise(2, step), impl=impl)
        assert torch.equal(pools[0].codes, pools[1].codes)
        assert torch.equal(pools[0].scale, pools[1].scale)
    assert not torch.equal(pools[0].codes, held.codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_any_course_of_calls_over_int8_states(K: int, V: int, dtype: torch.dtype) -> None:
    sizes = (K, V, 4 if INTERPRETED else 16)
    course = Int8Course("triton", sizes, dtype, str(DEVICE), seed=K)
    course.run(7 if INTERPRETED else 60)
    assert course.folds


def test_a_row_of_int8_that_is_not_finite_stays_not_finite() -> None:
    """So that a request whose state went wrong fails, and does not go on from zeros."""
    course = Int8Course("triton", (*WIDTHS[0], 2), torch.float32, str(DEVICE), seed=1)
    slots = torch.tensor([1, 2], device=DEVICE)
    q, k, v = course.tokens(2)
    k[0, 0, 3] = float("nan")
    for _ in range(3):
        lightning_attention_replay_int8(q, k, v, decay(), course.pool, slots, impl="triton")
    assert bool(course.pool.scale[1, 0, 3].isnan())
    o = lightning_attention_replay_int8(q, q, v, decay(), course.pool, slots, impl="triton")
    assert bool(o[0, 0].isnan().all())
    assert bool(o[1].isfinite().all())
