"""Split equals whole, packed equals separate, and nothing looks ahead or aside."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_statements import Inputs, borders, dense, make_inputs

from sevenfold.ops import lightning_attention, lightning_attention_step
from sevenfold.ops.testing import check_error

few = settings(derandomize=True, max_examples=15, deadline=None)
lengths_of_documents = st.lists(
    st.sampled_from([0, 1, 2, 31, 63, 64, 65, 129]), min_size=1, max_size=6
)


def run(x: Inputs, **options):
    return lightning_attention(
        *x[:4], initial_state=x.initial_state, return_final_state=True, **options
    )


def run_in_parts(x: Inputs, cuts: list[int], impl: str):
    outputs, state = [], x.initial_state
    for a, b in pairwise(cuts):
        part = Inputs(*(y[:, a:b] for y in x[:3]), x.log_decay, state)
        o, state = run(part, impl=impl)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def check_split(x: Inputs, cuts: list[int]) -> None:
    exact, honest = dense(x.to(torch.float64)), run(x, impl="reference")
    o, state = run_in_parts(x, cuts, "eager")
    check_error("o", o, honest.o, exact[0])
    check_error("final_state", state, honest.final_state, exact[1])


@few
@given(
    cuts=st.lists(st.integers(0, 150), max_size=4),
    decay=st.sampled_from(["first", "last", "mixed"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_split_equals_whole(cuts: list[int], decay: str, dtype: torch.dtype) -> None:
    check_split(make_inputs(decay, 150, B=2, dtype=dtype), sorted([0, *cuts, 150]))


@pytest.mark.parametrize("cut", [0, 1, 1023, 1024, 1025, 1090])
def test_split_equals_whole_across_blocks(cut: int) -> None:
    check_split(make_inputs([-5e-5], 1090, dtype=torch.float32), [0, cut, 1090])


@few
@given(cuts=st.lists(st.integers(0, 40), max_size=4))
def test_split_reference_is_the_same_bits(cuts: list[int]) -> None:
    x = make_inputs("mixed", 40, B=2, dtype=torch.float32)
    o, state = run_in_parts(x, sorted([0, *cuts, 40]), "reference")
    whole = run(x, impl="reference")
    assert torch.equal(o, whole.o)
    assert torch.equal(state, whole.final_state)


@few
@given(lengths=lengths_of_documents, dtype=st.sampled_from([torch.float64, torch.float32]))
def test_packed_equals_separate(lengths: list[int], dtype: torch.dtype) -> None:
    x = make_inputs("mixed", sum(lengths), N=len(lengths), dtype=dtype)
    packed = run(x, cu_seqlens=borders(lengths))
    exact = dense(x.to(torch.float64), lengths=lengths)
    start = 0
    for n, length in enumerate(lengths):
        tokens = slice(start, start + length)
        own = Inputs(*(y[:, tokens] for y in x[:3]), x.log_decay, x.initial_state[n : n + 1])
        alone = run(own)
        check_error("o", packed.o[:, tokens], alone.o, exact[0][:, tokens])
        check_error("state", packed.final_state[n], alone.final_state[0], exact[1][n])
        start += length


def test_packed_documents_of_equal_length_equal_rows_bit_by_bit() -> None:
    x = make_inputs("mixed", 70, B=3, dtype=torch.float32)
    flat = Inputs(*(y.flatten(0, 1)[None] for y in x[:3]), *x[3:])
    rows, packed = run(x), run(flat, cu_seqlens=borders([70, 70, 70]))
    assert torch.equal(packed.o.view_as(rows.o), rows.o)
    assert torch.equal(packed.final_state, rows.final_state)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_document_never_sees_another(changed: int, impl: str) -> None:
    lengths = [70, 3, 65]
    x = make_inputs("mixed", sum(lengths), N=3, dtype=torch.float32)
    other = [y.clone() for y in x]
    for y in other[:3]:
        y.split(lengths, dim=1)[changed].mul_(-2).add_(1)
    other[4][changed] += 5
    before = run(x, cu_seqlens=borders(lengths), impl=impl)
    after = run(Inputs(*other), cu_seqlens=borders(lengths), impl=impl)
    pairs = zip(before.o.split(lengths, dim=1), after.o.split(lengths, dim=1), strict=True)
    assert [torch.equal(a, b) for a, b in pairs] == [n != changed for n in range(3)]
    states = zip(before.final_state, after.final_state, strict=True)
    assert [torch.equal(a, b) for a, b in states] == [n != changed for n in range(3)]


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("at", [1, 63, 64, 65, 129])
def test_later_tokens_leave_earlier_outputs_alone(at: int, impl: str) -> None:
    x = make_inputs("mixed", 130, dtype=torch.float32)
    tokens = [y.clone() for y in x[:3]]
    for y in tokens:
        y[:, at:] = 1e3
    before, after = run(x, impl=impl).o, run(Inputs(*tokens, *x[3:]), impl=impl).o
    assert torch.equal(before[:, :at], after[:, :at])
    assert not bool((before[:, at:] == after[:, at:]).any())


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_batch_rows_are_independent(impl: str) -> None:
    x = make_inputs("mixed", 70, B=3, dtype=torch.float32)
    whole = run(x, impl=impl)
    for b in range(3):
        rows = (y[b : b + 1] for y in x[:3])
        alone = run(Inputs(*rows, x.log_decay, x.initial_state[b : b + 1]), impl=impl)
        exact = dense(Inputs(*rows_of(x, b)).to(torch.float64))
        check_error("o", whole.o[b : b + 1], alone.o, exact[0])
        check_error("state", whole.final_state[b : b + 1], alone.final_state, exact[1])
    changed = x._replace(q=x.q.clone(), v=x.v.clone())
    changed.q[1], changed.v[1] = 3.0, 1e3
    assert torch.equal(run(changed, impl=impl).o[[0, 2]], whole.o[[0, 2]])


def rows_of(x: Inputs, b: int):
    one = slice(b, b + 1)
    return x.q[one], x.k[one], x.v[one], x.log_decay, x.initial_state[one]


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_steps_equal_the_whole_run(scale: float, dtype: torch.dtype, impl: str) -> None:
    x = make_inputs("mixed", 20, B=2, dtype=dtype)
    outputs, state = [], x.initial_state
    for q, k, v in zip(*(y.unbind(1) for y in x[:3]), strict=True):
        o, state = lightning_attention_step(q, k, v, x.log_decay, state, scale=scale, impl=impl)
        outputs.append(o)
    honest = run(x, impl="reference", scale=scale)
    exact = dense(x.to(torch.float64), scale=scale)
    check_error("o", torch.stack(outputs, dim=1), honest.o, exact[0])
    check_error("state", state, honest.final_state, exact[1])
    assert (state.dtype, outputs[0].dtype) == (x.initial_state.dtype, dtype)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_no_call_changes_its_inputs(impl: str) -> None:
    x = make_inputs("mixed", 3, B=2, dtype=torch.float32)
    before = [y.clone() for y in x]
    o, state = lightning_attention_step(
        x.q[:, 0], x.k[:, 0], x.v[:, 0], x.log_decay, x.initial_state, impl=impl
    )
    result = run(x, impl=impl)
    for written in (state, o, result.final_state, result.o):
        written.fill_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_the_state_of_an_empty_run_is_a_copy(impl: str) -> None:
    x = make_inputs("mixed", 5, N=2, dtype=torch.float32)
    before = x.initial_state.clone()
    final = run(x, impl=impl, cu_seqlens=borders([0, 5])).final_state
    assert torch.equal(final[0], before[0])
    final.zero_()
    assert torch.equal(x.initial_state, before)
