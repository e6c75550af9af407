"""Decoding over states in fp16 and int8: the kernels, on a GPU or under Triton's interpreter."""

import pytest
import torch
from decode_cases import DEVICE, GPU_UNLESS_INTERPRETED, INTERPRETED, KERNEL_DTYPES, gaps, spread
from lightning_statements import DECAYS
from torch import Tensor

from sevenfold.ops import (
    Int8ReplayPool,
    Noise,
    ReplayPool,
    ScaledFp16,
    dequantise_rows,
    from_scaled_fp16,
    lightning_attention_commit,
    lightning_attention_commit_int8,
    lightning_attention_decode_fp16,
    lightning_attention_replay,
    lightning_attention_replay_int8,
    lightning_attention_verify,
    lightning_attention_verify_int8,
    quantise_rows,
    to_scaled_fp16,
)
from sevenfold.ops.testing import check_error, error_bound

pytestmark = [
    *([GPU_UNLESS_INTERPRETED] if GPU_UNLESS_INTERPRETED else []),
    pytest.mark.filterwarnings("ignore:.*has no tuning"),
]
WIDTHS = [(16, 24)] if INTERPRETED else [(64, 64), (96, 96), (128, 128), (256, 256), (128, 64)]
H, S = len(DECAYS["mixed"]), 4


def decay() -> Tensor:
    return torch.tensor(DECAYS["mixed"], device=DEVICE)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


def noise(B: int, step: int) -> Noise:
    key = torch.tensor([5, -(2**61), 2**40 + 3][:B], device=DEVICE)
    return Noise(key, torch.arange(B, device=DEVICE) + step, 7)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
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
    assert torch.equal(pool.codes[[1, 3]], held.codes[[1, 3]])
    assert bool((gaps(pool.codes) == 7).all())
    assert bool((gaps(pool.scale) == 7).all())


def test_fp16_rounds_by_the_same_bits_as_the_eager_form() -> None:
    """Whole numbers whose sums fp32 holds and fp16 does not."""
    K, V, zero = *WIDTHS[0], torch.zeros(H, device=DEVICE)
    held = to_scaled_fp16((randn(S, H, K, V, seed=0) * 500).round())
    slots = torch.tensor([1, 3], device=DEVICE)
    pools = [ScaledFp16(*(x.clone() for x in held)) for _ in range(2)]
    for step in range(3):
        q, k, v = (randn(2, H, w, seed=step + n).mul(60).round() for n, w in enumerate((K, K, V)))
        for pool, impl in zip(pools, ("triton", "eager"), strict=True):
            lightning_attention_decode_fp16(q, k, v, zero, pool, slots, noise(2, step), impl=impl)
        assert torch.equal(pools[0].codes, pools[1].codes)
        assert torch.equal(pools[0].scale, pools[1].scale)
    assert not torch.equal(pools[0].codes, held.codes)


class Int8Course:
    """One pool by the kernels; before each call a copy by the eager form, and one in fp64."""

    def __init__(self, widths: tuple[int, int], R: int, dtype: torch.dtype, seed: int) -> None:
        (K, V), self.R, self.dtype = widths, R, dtype
        self.widths, self.random = widths, torch.Generator().manual_seed(seed)
        codes, scale = quantise_rows(randn(S, H, K, V, seed=seed))
        # What a slot's last user left in its ring must never count.
        rings = [torch.full((S, H, R, w), float("nan"), device=DEVICE, dtype=dtype) for w in widths]
        count = torch.zeros(S, H, dtype=torch.int32, device=DEVICE)
        parts = (codes, scale, *rings, count)
        self.pool = Int8ReplayPool(*(spread(x) for x in parts))
        self.drafted = [0] * S  # tokens of each slot's draft that may be accepted
        self.folds = 0

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.random))

    def slots(self) -> Tensor:
        some = torch.randperm(S, generator=self.random)[: self.integer(1, S)]
        return torch.cat([some[:1], torch.tensor([-1]), some[1:]]).to(DEVICE)

    def tokens(self, *lead: int) -> tuple[Tensor, ...]:
        shapes = ((*lead, H, w) for w in (self.widths[0], *self.widths))
        draws = (torch.randn(shape, generator=self.random) for shape in shapes)
        return tuple(x.to(DEVICE, self.dtype) for x in draws)

    def accepted(self, slots: Tensor) -> Tensor:
        """Some first tokens of each slot's draft."""
        chosen = torch.full((len(slots), 3), -1, dtype=torch.int32)
        for b, slot in enumerate(slots.tolist()):
            if slot >= 0:
                most = self.integer(0, self.drafted[slot])
                chosen[b, :most] = torch.arange(most)
                self.drafted[slot] = 0
        return chosen.to(DEVICE)

    def replay(self) -> None:
        slots = self.slots()
        q, k, v = self.tokens(len(slots))
        for slot in slots.tolist():
            self.drafted[slot] = 0
        options = {"scale": 0.5}
        self.call(
            (lightning_attention_replay_int8, lightning_attention_replay), (q, k, v), slots, options
        )

    def verify(self, tree: bool) -> None:
        slots, T = self.slots(), self.integer(1, 3)
        sees = torch.ones(T, T, dtype=torch.bool).tril()
        if tree and T == 3:
            sees[2, 1] = False
        options = {
            "scale": 0.5,
            "accepted": self.accepted(slots),
            "ancestors": sees.expand(len(slots), T, T).to(DEVICE) if tree else None,
        }
        tokens = self.tokens(len(slots), T)
        self.call(
            (lightning_attention_verify_int8, lightning_attention_verify), tokens, slots, options
        )
        for slot in slots.tolist():
            self.drafted[slot] = 1 if tree else T

    def commit(self) -> None:
        slots = self.slots()
        options = {"accepted": self.accepted(slots)}
        ops = (lightning_attention_commit_int8, lightning_attention_commit)
        self.call(ops, (), slots, options)

    def call(self, ops: tuple, tokens: tuple[Tensor, ...], slots: Tensor, options: dict) -> None:
        op, plain = ops
        before = self.pool.codes.clone()
        honest, exact = self.copy(), self.wide(torch.float64)
        single = self.wide(torch.float32)
        wide = [x.double() for x in tokens]
        found = op(*tokens, decay(), self.pool, slots, impl="triton", **options)
        eager = op(*tokens, decay(), honest, slots, impl="eager", **options)
        wanted = plain(*wide, decay(), exact, slots, impl="reference", **options)
        plain(*(x.float() for x in tokens), decay(), single, slots, impl="eager", **options)
        if tokens:
            check_error("o", found, eager, wanted)
        assert torch.equal(self.pool.count, honest.count)
        P = self.pool.count[:, 0]
        used = torch.arange(self.R, device=DEVICE)[None, :] < P[:, None]
        for name in ("ring_k", "ring_v"):
            mine, other = (getattr(x, name).transpose(1, 2)[used] for x in (self.pool, honest))
            assert torch.equal(mine, other)
        state = dequantise_rows(self.pool.codes, self.pool.scale).double()
        half_step = self.pool.scale.double()[..., None] / 2 * (1 + 2**-16)
        bound = half_step + error_bound(exact.state, single.state)
        assert bool(((state - exact.state).abs() <= bound).all())
        self.folds += int((self.pool.codes != before).flatten(1).any(1).sum())

    def copy(self) -> Int8ReplayPool:
        parts = ("codes", "scale", "ring_k", "ring_v", "count")
        return Int8ReplayPool(*(getattr(self.pool, name).clone() for name in parts))

    def wide(self, dtype: torch.dtype) -> ReplayPool:
        state = dequantise_rows(self.pool.codes, self.pool.scale).to(dtype)
        rings = (self.pool.ring_k.to(dtype), self.pool.ring_v.to(dtype))
        return ReplayPool(state, *(x.clone() for x in (*rings, self.pool.count)))

    def run(self, calls: int) -> None:
        for _ in range(calls):
            match self.integer(0, 6):
                case 0:
                    self.commit()
                case 1 | 2 | 3:
                    self.replay()
                case 4:
                    self.verify(tree=True)
                case _:
                    self.verify(tree=False)
        tensors = (x for x in self.pool.tensors())
        assert all(bool((gaps(x) == 7).all()) for x in tensors)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_any_course_of_calls_over_int8_states(K: int, V: int, dtype: torch.dtype) -> None:
    course = Int8Course((K, V), R=4 if INTERPRETED else 16, dtype=dtype, seed=K)
    course.run(9 if INTERPRETED else 60)
    assert course.folds


def test_a_row_of_int8_that_is_not_finite_stays_not_finite() -> None:
    """So that a request whose state went wrong fails, and does not go on from zeros."""
    course = Int8Course(WIDTHS[0], R=2, dtype=torch.float32, seed=1)
    slots = torch.tensor([1, 2], device=DEVICE)
    q, k, v = course.tokens(2)
    k[0, 0, 3] = float("nan")
    for _ in range(3):
        lightning_attention_replay_int8(q, k, v, decay(), course.pool, slots, impl="triton")
    assert bool(course.pool.scale[1, 0, 3].isnan())
    o = lightning_attention_replay_int8(q, q, v, decay(), course.pool, slots, impl="triton")
    assert bool(o[0, 0].isnan().all())
    assert bool(o[1].isfinite().all())
