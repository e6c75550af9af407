from dataclasses import replace

import numpy as np
import pytest
import torch
from train_helpers import MOE, HandLoader, HandSample, hand_sample, tiny_model

from sevenfold.config import TrainingError
from sevenfold.models import HybridModel
from sevenfold.ops import linear_cross_entropy
from sevenfold.ops.testing import check_error
from sevenfold.train.batch import StepBatch, read_step
from sevenfold.train.step import StepValues, fault_of, forward_backward, gradient_norm, to_host

CPU = torch.device("cpu")
# Four rows with 16, 11, 1 and 13 labels, of one document or several.
UNEVEN = HandLoader(
    [
        hand_sample(0),
        hand_sample(1, lengths=(5, 11), num_ignored=5),
        hand_sample(2, lengths=(16,), num_ignored=15),
        hand_sample(3, lengths=(3, 9, 4), num_ignored=3),
    ]
)


def read(loader: HandLoader, micro_batch_rows: int | None = None, rows: int = 4) -> StepBatch:
    return read_step(loader, 0, rows, micro_batch_rows=micro_batch_rows, device=CPU)


def run(model: HybridModel, step: StepBatch, autocast: str | None = None):
    model.train().zero_grad()
    losses = forward_backward(model, step, autocast=autocast)
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def whole_batch_by_definition(model: HybridModel) -> torch.Tensor:
    """Mean cross-entropy over all labels, each document run alone."""
    summed, count = torch.zeros((), dtype=model.dtype), 0
    for sample in UNEVEN.samples:
        ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
        for x, y in zip(ids.split(sample.lengths), labels.split(sample.lengths), strict=True):
            logits = model(x[None])[0]
            summed = summed + torch.nn.functional.cross_entropy(logits, y, reduction="sum")
            count += int((y != -100).sum())
    return summed / count


@pytest.mark.parametrize("micro_batch_rows", [None, 4, 3, 2, 1])
def test_accumulation_equals_one_big_batch(micro_batch_rows: int | None) -> None:
    exact_model = tiny_model(dtype=torch.float64)
    exact_loss = whole_batch_by_definition(exact_model)
    exact_loss.backward()
    model = tiny_model()
    eager_loss, eager = run(model, read(UNEVEN))
    step = read(UNEVEN, micro_batch_rows)
    losses, gradients = run(model, step)
    assert len(step.micro_batches) == -(-4 // (micro_batch_rows or 4))
    check_error("loss", losses[0], eager_loss[0], exact_loss.detach())
    for name, parameter in exact_model.named_parameters():
        check_error(name, gradients[name], eager[name], parameter.grad)


def test_labels_and_bytes_are_counted_before_the_model_runs() -> None:
    step = read(UNEVEN, 2)
    assert [micro.num_labels for micro in step.micro_batches] == [16 + 11, 1 + 13]
    assert (step.num_labels, step.num_rows) == (41, 4)
    assert step.num_bytes == 3 * 41
    assert step.lengths == (16, 5, 11, 16, 3, 9, 4)


def test_rows_of_one_document_stay_rows_and_others_are_packed() -> None:
    rows, packed = read(UNEVEN, 1).micro_batches[0], read(UNEVEN, 2).micro_batches[1]
    assert (rows.batch.cu_seqlens, rows.input_ids.shape) == (None, (1, 16))
    assert packed.batch.cu_seqlens is not None
    assert packed.batch.cu_seqlens.tolist() == [0, 16, 19, 28, 32]


def test_a_step_without_labels_is_refused() -> None:
    empty = HandLoader([hand_sample(0, num_ignored=16)])
    with pytest.raises(TrainingError, match="samples 0 to 1 must have a label, got none"):
        read(empty, rows=2)


def losses_of_router(x: torch.Tensor, weight: torch.Tensor, k: int) -> torch.Tensor:
    """Balance and z of tokens x [T, D], token by token."""
    logits, E = x @ weight.T, len(weight)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(k).indices, 1.0)
    balance = E * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()
    return torch.stack([balance, logits.logsumexp(-1).square().mean()])


def router_losses_by_definition(model: HybridModel, step: StepBatch):
    """Means [loss, balance, z] and gradients, straight from the formula."""
    model.train().zero_grad()
    found: list[torch.Tensor] = []
    for layer in model.layers:
        layer.mlp.gate.register_forward_pre_hook(
            lambda gate, args: found.append(losses_of_router(args[0], gate.weight, gate.num_chosen))
        )
    total, means = torch.zeros((), dtype=model.dtype), torch.zeros(3, dtype=model.dtype)
    for micro in step.micro_batches:
        found.clear()
        result = model.hidden(micro.input_ids, micro.batch)
        summed = linear_cross_entropy(result.hidden, model.lm_head.weight, micro.labels)
        balance, z = torch.stack(found).mean(0)
        share = micro.num_labels / step.num_labels
        total = total + summed / step.num_labels + share * (0.01 * balance + 0.001 * z)
        means += share * torch.stack([summed / micro.num_labels, balance, z]).detach()
    total.backward()
    return means, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_router_losses_count_with_their_coefficients_and_by_labels() -> None:
    step = read(UNEVEN, 2)
    exact_means, exact = router_losses_by_definition(tiny_model(dtype=torch.float64, moe=MOE), step)
    means, eager = router_losses_by_definition(tiny_model(moe=MOE), step)
    losses, gradients = run(tiny_model(moe=MOE), step)
    layers = losses[1:].view(2, 3 + MOE["num_local_experts"])
    found = torch.cat([losses[:1], layers[:, :2].mean(0)])
    check_error("losses", found, means, exact_means)
    for name, gradient in gradients.items():
        check_error(name, gradient, eager[name], exact[name])
    assert (layers[:, :2] > 0).all()
    values = to_host(tiny_model(moe=MOE), losses, torch.tensor(0.0))
    assert values.dropped_by_layer == (0.0, 0.0)
    assert values.load_by_layer == tuple((2 * layers[:, 3:].amax(1)).tolist())
    assert torch.equal(layers[:, 3:].sum(1), torch.ones(2))


def unpadded(samples: list[HandSample]) -> HandSample:
    """Packed rows as one row without their padding."""
    ends = [len(sample.input_ids) - sample.num_padding_tokens for sample in samples]
    ids, labels = (
        np.concatenate([x[:end] for x, end in zip(part, ends, strict=True)])
        for part in ([s.input_ids for s in samples], [s.labels for s in samples])
    )
    lengths = [s.lengths[:-1] if s.num_padding_tokens else s.lengths for s in samples]
    return HandSample(ids, labels, sum(lengths, ()), sum(s.num_bytes for s in samples))


@pytest.mark.parametrize("rows", [(0, 3), (3, 0, 1), (3, 1)])
def test_no_router_counts_padding_and_no_expert_computes_it(rows: tuple[int, ...]) -> None:
    """Behind all tokens, before some, and around some."""
    padded = [replace(hand_sample(4, lengths=(3, 2, 11)), num_padding_tokens=11)]
    padded[0].labels[5:] = -100
    others = [hand_sample(0), hand_sample(1, lengths=(6, 10), num_ignored=5), hand_sample(2)]
    samples = [(others + padded)[row] for row in rows]
    moe = MOE | {"capacity_factor": 0.8}
    step, plain = (
        read(HandLoader(samples), rows=len(rows)),
        read(HandLoader([unpadded(samples)]), rows=1),
    )
    exact_losses, exact = run(tiny_model(dtype=torch.float64, moe=moe), plain)
    eager_losses, eager = run(tiny_model(moe=moe), plain)
    losses, gradients = run(tiny_model(moe=moe), step)
    assert (losses.view(-1)[1:].view(2, -1)[:, 2] > 0).all()
    check_error("losses", losses, eager_losses, exact_losses)
    for name, gradient in gradients.items():
        check_error(name, gradient, eager[name], exact[name])


def test_a_coefficient_of_zero_leaves_the_gradient_alone() -> None:
    without = MOE | {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    with_coefficients = run(tiny_model(moe=MOE), read(UNEVEN))[1]
    alone = run(tiny_model(moe=without), read(UNEVEN))[1]
    router = "layers.0.mlp.gate.weight"
    assert not torch.equal(alone[router], with_coefficients[router])


def test_bf16_rounds_products_and_keeps_weights_and_gradients_in_fp32() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    exact = run(tiny_model(dtype=torch.float64), read(UNEVEN))[0]
    with torch.no_grad():
        plain = whole_batch_by_definition(tiny_model(dtype=torch.bfloat16))[None]
    losses, gradients = run(model, read(UNEVEN), autocast="bf16")
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert losses[0] != run(model, read(UNEVEN))[0][0]
    check_error("loss", losses[:1], plain.to(torch.bfloat16), exact[:1])


def test_the_gradient_norm_is_over_all_parameters() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    model.bias.grad = torch.tensor([10.0, 10.0])
    assert gradient_norm(model.parameters()).item() == 15.0
    model.bias.grad = None
    assert gradient_norm(model.parameters()).item() == 5.0


@pytest.mark.parametrize(
    ("losses", "norm", "fault"),
    [
        ([1.0, 0.0, 0.0, 0.0], 2.0, None),
        ([float("nan"), 0.0, 0.0, 0.0], 2.0, "loss is nan"),
        ([1.0, 0.0, 0.0, 0.0], float("inf"), "grad_norm is inf"),
        ([1.0, float("-inf"), 0.0, 0.0], 2.0, "balance_loss is -inf"),
        ([1.0, 0.0, float("inf"), 0.0], 2.0, "z_loss is inf"),
    ],
)
def test_what_is_not_finite_is_named(losses: list[float], norm: float, fault: str | None) -> None:
    values = to_host(tiny_model(moe=MOE), torch.tensor([*losses, 0.5, 0.5]), torch.tensor(norm))
    assert isinstance(values, StepValues)
    assert fault_of(values) == fault
