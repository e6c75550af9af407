"""Ring, drafts and commits: whatever the calls, each token is what the recurrence says of it."""

import pytest
import torch
from decode_cases import Course, Sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_statements import DECAYS, make_inputs, recurrence

from sevenfold.ops import (
    ReplayPool,
    lightning_attention_commit,
    lightning_attention_replay,
    lightning_attention_verify,
)
from sevenfold.ops.testing import check_error

IMPLS = ["reference", "eager"]
DECAYS_OF_COURSES = ["zero", "5e-5", "middle", "last", "fast", "mixed"]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    R=st.integers(1, 14),
    drafted=st.integers(1, 6),
    decay=st.sampled_from(DECAYS_OF_COURSES),
    apart=st.booleans(),
    tree=st.booleans(),
)
def test_any_course_of_compiled_drafts(
    seed: int, R: int, drafted: int, decay: str, apart: bool, tree: bool
) -> None:
    sizes = Sizes(R=R, most_drafted=min(R, drafted), decay=decay, apart=apart)
    course = Course("numba", sizes, torch.float32, "cpu", seed)
    for step in range(20):
        course.commit() if step % 5 == 4 else course.verify(tree)
    course.check()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    R=st.integers(1, 14),
    drafted=st.integers(1, 6),
    decay=st.sampled_from(DECAYS_OF_COURSES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    impl=st.sampled_from(IMPLS),
)
def test_any_course_of_calls(
    seed: int, R: int, drafted: int, decay: str, dtype: torch.dtype, impl: str
) -> None:
    sizes = Sizes(R=R, most_drafted=min(R, drafted), decay=decay)
    Course(impl, sizes, dtype, "cpu", seed).run(20).check()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("decay", DECAYS)
def test_hundreds_of_steps_of_the_ring(decay: str, impl: str) -> None:
    T = 300
    x = make_inputs(decay, T, dtype=torch.bfloat16)
    exact, honest = recurrence(x.to(torch.float64)), recurrence(x.to(torch.float32))
    H = len(x.log_decay)
    pool = ReplayPool.zeros(1, H, (2, 3))
    pool.state.copy_(x.initial_state)
    slots = torch.tensor([0])
    o = [
        lightning_attention_replay(*(y[:, t] for y in x[:3]), x.log_decay, pool, slots, impl=impl)
        for t in range(T)
    ]
    check_error("o", torch.stack(o, dim=1), honest[0].bfloat16(), exact[0])
    lightning_attention_commit(x.log_decay, pool, slots, impl=impl)
    check_error("state", pool.state, honest[1], exact[1])


def test_a_state_is_written_once_in_as_many_tokens_as_the_ring_holds() -> None:
    x = make_inputs("mixed", 12, dtype=torch.float32)
    pool, slots, R = ReplayPool.zeros(1, 4, (2, 3), ring_tokens=4, dtype=torch.float32), [0], 4
    written = []
    for t in range(12):
        before = pool.state.clone()
        tokens = (y[:, t] for y in x[:3])
        lightning_attention_replay(*tokens, x.log_decay, pool, torch.tensor(slots))
        written.append(not torch.equal(before, pool.state))
        assert pool.count.unique().tolist() == [t % R + 1]
    assert written == [t > 0 and t % R == 0 for t in range(12)]


@pytest.mark.parametrize("impl", IMPLS)
def test_branches_accepted_in_a_ring_that_holds_them(impl: str) -> None:
    sizes = Sizes(R=32, most_drafted=8, slots=3)
    course = Course(impl, sizes, torch.float32, "cpu", seed=2)
    for _ in range(8):
        course.verify(tree=True)
    course.check()


def test_a_draft_writes_no_state_and_counts_only_once_it_is_accepted() -> None:
    x = make_inputs("mixed", 3, dtype=torch.float32)
    pool = ReplayPool.zeros(1, 4, (2, 3), ring_tokens=8, dtype=torch.float32)
    slots = torch.tensor([0])
    first = lightning_attention_verify(*x[:4], pool, slots)
    assert not pool.state.any()
    assert not pool.count.any()
    assert torch.equal(lightning_attention_verify(*x[:4], pool, slots), first)
    accepted = torch.tensor([[0, 1, -1]], dtype=torch.int32)
    lightning_attention_verify(*x[:4], pool, slots, accepted=accepted)
    assert pool.count.unique().tolist() == [2]
    assert not pool.state.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tree_of_one_path_is_a_chain(impl: str) -> None:
    x = make_inputs("mixed", 4, dtype=torch.float32)
    chain = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    found = []
    for ancestors in (None, chain):
        pool = ReplayPool.zeros(1, 4, (2, 3), dtype=torch.float32)
        pool.state.copy_(x.initial_state)
        options = {"ancestors": ancestors, "impl": impl}
        found.append(lightning_attention_verify(*x[:4], pool, torch.tensor([0]), **options))
    assert torch.equal(*found)


def test_the_allocator_counts_its_bytes() -> None:
    pool = ReplayPool.zeros(3, 5, (4, 6), ring_tokens=7, dtype=torch.bfloat16)
    sizes = [x.numel() * x.element_size() for x in pool.tensors()]
    assert sum(sizes) == 3 * 5 * (4 * 4 * 6 + 7 * (4 + 6) * 2 + 4)
    assert not any(x.any() for x in pool.tensors())
    assert [x.dtype for x in pool.tensors()] == [
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
        torch.int32,
    ]
    assert ReplayPool.zeros(1, 1, (1, 1), dtype=torch.float64).state.dtype == torch.float64
    with pytest.raises(ValueError, match="ring_tokens must be at least 1, got 0"):
        ReplayPool.zeros(1, 1, (1, 1), ring_tokens=0)
