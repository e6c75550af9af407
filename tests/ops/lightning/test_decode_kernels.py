"""The decoding kernels keep to the error rule, on a GPU or under Triton's interpreter."""

import pytest
import torch
from decode_cases import Course, Sizes, gaps, spread
from kernel_device import DEVICE, DTYPES, GPU_UNLESS_INTERPRETED, INTERPRETED
from lightning_statements import make_inputs, recurrence

from sevenfold.ops import lightning_attention_decode, lightning_attention_step
from sevenfold.ops.testing import check_error

pytestmark = [
    *GPU_UNLESS_INTERPRETED,
    pytest.mark.filterwarnings("ignore:.*has no tuning"),
]

WIDTHS = [(16, 24)] if INTERPRETED else [(64, 64), (96, 96), (128, 128), (256, 256), (128, 64)]
DECAY_NAMES = ["mixed"] if INTERPRETED else ["zero", "5e-5", "first", "middle", "last", "fast"]
RINGS = [(5, "mixed")] if INTERPRETED else [(4, "zero"), (16, "last"), (20, "mixed")]
CALLS = 5 if INTERPRETED else 20


@pytest.mark.parametrize("decay", DECAY_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_steps_agree_with_the_recurrence(K: int, V: int, dtype: torch.dtype, decay: str) -> None:
    T, slots = 2 if INTERPRETED else 64, torch.tensor([2, -1, 0], device=DEVICE)
    x = make_inputs(decay, T, B=3, K=K, V=V, dtype=dtype)
    start = torch.randn(3, *x.initial_state.shape[1:], generator=torch.Generator().manual_seed(1))
    x = x._replace(initial_state=start[[2, 1, 0]])
    exact = recurrence(x._replace(initial_state=x.initial_state).to(torch.float64), scale=0.5)
    honest = recurrence(x.to(torch.float32), scale=0.5)
    pool = spread(start.to(DEVICE))
    q, k, v, log_decay = (y.to(DEVICE) for y in x[:4])
    found = torch.stack(
        [
            lightning_attention_decode(
                q[:, t], k[:, t], v[:, t], log_decay, pool, slots, scale=0.5, impl="triton"
            )
            for t in range(T)
        ],
        dim=1,
    ).cpu()
    check_error("o", found[::2], honest[0][::2].to(dtype), exact[0][::2])
    assert not found[1].any()
    check_error("pool", pool.cpu()[[2, 0]], honest[1][::2], exact[1][::2])
    assert torch.equal(pool[1].cpu(), start[1])
    assert bool((gaps(pool) == 7).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_over_states_of_their_own_leave_them_as_they_are(dtype: torch.dtype) -> None:
    (K, V), T = WIDTHS[0], 2
    x = make_inputs("mixed", T, B=3, K=K, V=V, dtype=dtype)
    exact, honest = (recurrence(x.to(d), scale=0.5) for d in (torch.float64, torch.float32))
    q, k, v, log_decay = (y.to(DEVICE) for y in x[:4])
    state, outputs = x.initial_state.to(DEVICE), []
    for t in range(T):
        before = state.clone()
        o, after = lightning_attention_step(
            q[:, t], k[:, t], v[:, t], log_decay, state, scale=0.5, impl="triton"
        )
        assert torch.equal(state, before)
        outputs.append(o)
        state = after
    check_error("o", torch.stack(outputs, 1).cpu(), honest[0].to(dtype), exact[0])
    check_error("state", state.cpu(), honest[1], exact[1])


@pytest.mark.parametrize(("R", "decay"), RINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_any_course_of_calls(K: int, V: int, dtype: torch.dtype, R: int, decay: str) -> None:
    sizes = Sizes(K, V, R, min(R, 16), decay, slots=2 if INTERPRETED else 4, apart=True)
    Course("triton", sizes, dtype, str(DEVICE), seed=R).run(CALLS).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ring_that_fills_token_by_token(dtype: torch.dtype) -> None:
    course = Course("triton", Sizes(16, 16, R=3, slots=1), dtype, str(DEVICE), seed=1)
    for _ in range(8):
        course.replay()
    course.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_branches_accepted_in_a_ring_that_holds_them(dtype: torch.dtype) -> None:
    sizes = Sizes(16, 16, R=32, most_drafted=8, slots=2)
    course = Course("triton", sizes, dtype, str(DEVICE), seed=2)
    for _ in range(5):
        course.verify(tree=True)
    course.check()


def test_drafts_as_long_as_the_ring() -> None:
    sizes = Sizes(16, 16, 16, 16, "mixed", slots=1)
    course = Course("triton", sizes, torch.float32, str(DEVICE), seed=3)
    for tree in (True, False, True):
        course.verify(tree)
    course.check()
