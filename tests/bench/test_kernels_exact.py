"""The kernel benchmark's check: right outputs pass it, wrong ones of every kind do not."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sevenfold.bench.kernels import exact
from sevenfold.bench.kernels.cases import Case, Task
from sevenfold.bench.kernels.exact import (
    Sample,
    expect_decode,
    expect_lightning,
    expect_softmax,
)
from sevenfold.bench.kernels.inputs import DecodeInputs, Inputs, case_inputs, decode_inputs
from sevenfold.ops import lightning_attention
from sevenfold.ops.testing import check_error

CPU = torch.device("cpu")
FORWARD = Case("f", ("forward",), Task.FORWARD, 3, 70, 5)
BACKWARD = Case("b", ("backward",), Task.BACKWARD, 2, 40, 4)
PACKED = Case("p", ("packed",), Task.FORWARD, 1, 64, 3, lengths=(10, 0, 1, 53))


def reference(inputs: Inputs) -> dict[str, torch.Tensor]:
    """By the literal recurrence, and autograd through it, in fp64."""
    q, k, v = (x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    packing = {"cu_seqlens": inputs.cu_seqlens, "impl": "reference"}
    o = lightning_attention(q, k, v, inputs.log_decay, **packing).o
    if inputs.do is None:
        return {"o": o.detach()}
    grads = torch.autograd.grad(o, (q, k, v), inputs.do.double())
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


@pytest.mark.parametrize("case", [FORWARD, BACKWARD, PACKED], ids=lambda case: case.name)
def test_lightning_is_the_recurrence(case: Case) -> None:
    inputs = case_inputs(case, CPU)
    expected, outputs = expect_lightning(case, inputs, with_eager=True), reference(inputs)
    assert sorted(expected.exact) == sorted(outputs)
    for name, output in outputs.items():
        eager = expected.exact[name].float()
        check_error(name, expected.exact[name], eager, expected.sample.of(output))
    share = expected.share_of_bound(outputs)
    assert share is not None
    assert share < expected.share_of_bound({n: 1.1 * x for n, x in outputs.items()})


def test_the_sample_reaches_both_ends() -> None:
    x = torch.arange(2 * 3 * 5 * 1).view(2, 3, 5, 1)
    expected = expect_lightning(FORWARD, case_inputs(FORWARD, CPU), with_eager=False)
    assert (expected.sample.rows, expected.sample.heads) == ((0, 2), (0, 2, 4))
    sample = Sample((0, 1), (0, 4), torch.tensor([2]))
    assert torch.equal(sample.of(x), x[[0, 1]][:, [2]][:, :, [0, 4]])


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
def test_one_wrong_head_shows(name: str) -> None:
    inputs = case_inputs(BACKWARD, CPU)
    expected, outputs = expect_lightning(BACKWARD, inputs, with_eager=True), reference(inputs)
    assert expected.relative_error(outputs) < exact.MAX_RELATIVE_ERROR
    outputs[name][-1, :, -1] *= 1.5
    assert expected.relative_error(outputs) > exact.MAX_RELATIVE_ERROR
    share = expected.share_of_bound(outputs)
    assert share is not None
    assert share > 1


def test_the_relative_error_is_that_of_the_worst_output() -> None:
    inputs = case_inputs(BACKWARD, CPU)
    expected, outputs = expect_lightning(BACKWARD, inputs, with_eager=False), reference(inputs)
    outputs["dk"] *= 1.25
    assert round(expected.relative_error(outputs), 6) == 0.25
    assert expected.share_of_bound(outputs) is None
    outputs["o"][0, 0, 0] = float("nan")
    assert not expected.relative_error(outputs) <= exact.MAX_RELATIVE_ERROR


def test_long_rows_are_compared_at_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_WHOLE_TOKENS", 50)
    monkeypatch.setattr(exact, "_LAST_TOKENS", 9)
    inputs = case_inputs(FORWARD, CPU)
    expected, outputs = expect_lightning(FORWARD, inputs, with_eager=True), reference(inputs)
    assert expected.sample.tokens is not None
    assert expected.sample.tokens.tolist() == list(range(61, 70))
    assert expected.relative_error(outputs) < torch.finfo(torch.float32).eps
    share = expected.share_of_bound(outputs)
    assert share is not None
    assert share < 1
    outputs["o"][-1, -9, -1] *= 2
    assert expected.relative_error(outputs) > exact.MAX_RELATIVE_ERROR


def softmax_outputs(inputs: Inputs) -> dict[str, torch.Tensor]:
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    o = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    if inputs.do is None:
        return {"o": o.detach()}
    grads = torch.autograd.grad(o, leaves, inputs.do.double())
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


@pytest.mark.parametrize("case", [FORWARD, BACKWARD], ids=lambda case: case.name)
def test_softmax_is_pytorchs(case: Case) -> None:
    inputs = case_inputs(case, CPU)
    expected, outputs = expect_softmax(case, inputs), softmax_outputs(inputs)
    assert sorted(expected.exact) == sorted(outputs)
    assert expected.relative_error(outputs) < torch.finfo(torch.float32).eps
    outputs["o"][-1, -1, -1] += 1
    assert expected.relative_error(outputs) > exact.MAX_RELATIVE_ERROR


def test_long_softmax_is_compared_at_some_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_SOFTMAX_WHOLE_TOKENS", 50)
    monkeypatch.setattr(exact, "_SOFTMAX_QUERIES", 4)
    inputs = case_inputs(FORWARD, CPU)
    expected = expect_softmax(FORWARD, inputs)
    assert expected.sample.tokens is not None
    assert expected.sample.tokens.tolist() == [0, 23, 46, 69]
    assert expected.relative_error(softmax_outputs(inputs)) < torch.finfo(torch.float32).eps


def decode(inputs: DecodeInputs) -> torch.Tensor:
    """The recurrence over the tokens, from the states of the first turn's slots."""
    state = inputs.new_pool()[inputs.slots[0]].double()
    decay = inputs.log_decay.double().exp()[:, None, None]
    outputs = []
    for q, k, v in zip(inputs.q.double(), inputs.k.double(), inputs.v.double(), strict=True):
        state = decay * state + k[..., :, None] * v[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q, state))
    return torch.stack(outputs)


@pytest.mark.parametrize("task", [Task.DECODE, Task.VERIFY])
def test_decoding_is_the_recurrence(task: Task) -> None:
    case = Case("d", ("decode",), task, 2, 1, 2)
    inputs = decode_inputs(case, CPU)
    expected, o = expect_decode(case, inputs, with_eager=True), decode(inputs)
    assert expected.exact["o"].shape[0] == len(inputs.q) == (4 if task is Task.VERIFY else 20)
    assert expected.relative_error({"o": o}) < torch.finfo(torch.float32).eps
    share = expected.share_of_bound({"o": o})
    assert share is not None
    assert share < 1
    o[-1, 1, 0] += o.abs().max()  # the last token of the second sequence
    assert expected.relative_error({"o": o}) > exact.MAX_RELATIVE_ERROR


def test_inputs_are_the_same_wherever_they_are_drawn() -> None:
    first, second = case_inputs(BACKWARD, CPU), case_inputs(BACKWARD, CPU)
    assert torch.equal(first.k, second.k)
    assert not torch.equal(first.q, first.k)
    other = case_inputs(FORWARD, CPU)
    assert other.do is None
    assert not torch.equal(other.q[:2, :40, :4], first.q)
    case = Case("d", ("decode",), Task.DECODE, 2, 1, 1)
    inputs = decode_inputs(case, CPU)
    assert torch.equal(inputs.new_pool(), decode_inputs(case, CPU).new_pool())
    assert sorted(inputs.slots.flatten().tolist()) == list(range(2 * inputs.turns))
