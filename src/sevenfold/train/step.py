"""One training step: loss and gradients over micro-batches, clipping, update."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sevenfold.models import HybridModel
from sevenfold.models.router_stats import RouterCounts
from sevenfold.train.batch import StepBatch


@dataclass(frozen=True)
class StepValues:
    """What a step computed, on the host.

    loss: mean cross-entropy over the step's labels, nats; grad_norm: before clipping.
    balance_loss, z_loss, dropped: mean over layers with experts, 0 without; dropped is a share.
    dropped_by_layer: of each layer with experts.
    load_by_layer: what the busiest expert of each was chosen for, over an even share; 1 at best.
    """

    loss: float
    grad_norm: float
    balance_loss: float
    z_loss: float
    dropped: float
    dropped_by_layer: tuple[float, ...] = ()
    load_by_layer: tuple[float, ...] = ()


def autocast_context(device: torch.device, autocast: str | None) -> AbstractContextManager[object]:
    """Return the context in which the model's forward runs: bf16 products, or as they are."""
    if autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def forward_backward(model: HybridModel, step: StepBatch, *, autocast: str | None) -> Tensor:
    """Accumulate the gradients of one step.

        loss = sum over micro-batches of (sum_t CE_t + n_m R_m) / n
        R_m = aux_coef * mean_l balance_lm + z_coef * mean_l z_lm

    n_m labels are in micro-batch m and n in the step, so tokens weigh alike wherever they lie. The
    balance of experts is taken within a micro-batch: it is no sum over tokens, and the one number
    that depends on how a step is divided.

    Where ranks share a step, n_m and n count the labels of all of them, and CE and R are one rank's
    share: losses and gradients are sums over the ranks.

    Args:
        model: in training mode; gradients are added to its parameters'.
        step: the micro-batches.
        autocast: "bf16" or None.

    Returns:
        [1 + (3 + E) L] fp32 on the device: the loss, and for each of L layers with experts
        balance_loss, z_loss, dropped and the experts' loads; this rank's share of each, losses
        without coefficients.
    """
    parts = []
    for micro in step.micro_batches:
        share = micro.num_labels / step.num_labels
        with autocast_context(model.device, autocast):
            result = model.hidden(micro.input_ids, micro.batch)
            summed = model.cross_entropy(result.hidden, micro.labels)
            router = router_rows(model, result.router, summed)
        loss = summed / step.num_labels
        (loss + share * router_losses(model, router)).backward()
        parts.append(torch.cat([loss.detach()[None], share * router.detach().flatten()]))
    return torch.stack(parts).sum(0)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the global 2-norm of the gradients, a scalar on the device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def to_host(model: HybridModel, losses: Tensor, grad_norm: Tensor) -> StepValues:
    """Read a step's numbers back: the one synchronisation with the device in a step."""
    loss, *router, norm = torch.cat([losses, grad_norm[None]]).cpu().tolist()
    if model.config.moe is None:
        return StepValues(loss, norm, 0.0, 0.0, 0.0)
    E, k = model.config.moe.num_local_experts, model.config.moe.num_experts_per_tok
    rows = [router[at : at + 3 + E] for at in range(0, len(router), 3 + E)]
    balance, z_loss, dropped = ([row[i] for row in rows] for i in range(3))
    loads = tuple(max(row[3:]) * E / k for row in rows)
    means = [sum(values) / len(rows) for values in (balance, z_loss, dropped)]
    return StepValues(loss, norm, means[0], means[1], means[2], tuple(dropped), loads)


def router_rows(model: HybridModel, counts: Sequence[RouterCounts], like: Tensor) -> Tensor:
    """Return [layers, 3 + E]: balance_loss, z_loss, dropped and loads of layers with experts."""
    stats = model.router_stats(counts)
    if stats is None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return like.new_zeros(0, 3, dtype=dtype)
    return stats.rows


def router_losses(model: HybridModel, rows: Tensor) -> Tensor | float:
    """Return the weighted mean of the routers' losses over all layers, of which rows are some."""
    moe = model.config.moe
    if moe is None:
        return 0.0
    balance, z_loss = rows[:, :2].sum(0) / len(model.layers)
    weighted = ((moe.router_aux_loss_coef, balance), (moe.router_z_loss_coef, z_loss))
    # A coefficient of 0 must spare the backward, and 0 * inf would be NaN.
    return sum((coefficient * loss for coefficient, loss in weighted if coefficient), start=0.0)


def fault_of(values: StepValues) -> str | None:
    """Say which number of a step is not finite; None if all are."""
    for name in ("loss", "grad_norm", "balance_loss", "z_loss"):
        value = getattr(values, name)
        if not math.isfinite(value):
            return f"{name} is {value}"
    return None
