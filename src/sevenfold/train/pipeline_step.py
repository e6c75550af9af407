"""A training step of a rank that holds some stages of a pipeline."""

from collections.abc import Callable

import torch
from torch import Tensor

from sevenfold.models import HybridModel
from sevenfold.parallel import Pipeline, Stage, with_loss
from sevenfold.train.batch import MicroBatch, StepBatch
from sevenfold.train.step import autocast_context, router_losses, router_rows


def forward_backward_by_stages(
    model: HybridModel, pipeline: Pipeline, step: StepBatch, *, autocast: str | None
) -> Tensor:
    """Accumulate the gradients of one step, as forward_backward does, of this rank's stages.

    The last stage has the cross-entropy; each adds its routers' losses where they arise.

    Args:
        model: what the rank holds, in training mode.
        pipeline: its stages.
        step: micro-batches of equal size.
        autocast: "bf16" or None.

    Returns:
        As forward_backward: this rank's share, 0 for the layers of others.
    """
    shares = _Shares(model)

    def compute(stage: Stage, micro_batch: int, x: Tensor | None) -> Tensor:
        micro = step.micro_batches[micro_batch]
        shape = micro.input_ids.shape
        share = micro.num_labels / step.num_labels
        with autocast_context(model.device, autocast):
            tokens = micro.input_ids if x is None else x.view(*shape, -1)
            y, counts = model.run_stage(stage, tokens, micro.batch)  # pyright: ignore[reportCallIssue]
            rows = router_rows(model, counts, y)
            auxiliary = share * router_losses(model, rows)
            if not stage.is_last:
                shares.add(stage, None, share * rows.detach())
                y = y.flatten(0, 1)
                return with_loss(y, auxiliary) if isinstance(auxiliary, Tensor) else y
            loss = model.cross_entropy(y, micro.labels) / step.num_labels
            shares.add(stage, loss.detach(), share * rows.detach())
        return (loss + auxiliary)[None]

    pipeline.forward_backward(
        len(step.micro_batches), step.micro_batches[0].input_ids.numel(), compute
    )
    return shares.total()


def read_by_stages(
    model: HybridModel,
    pipeline: Pipeline,
    step: StepBatch,
    read: Callable[[Tensor, MicroBatch], None],
    *,
    autocast: str | None,
) -> None:
    """Run a step's micro-batches forward, without a gradient.

    Args:
        model: what the rank holds.
        pipeline: its stages.
        step: micro-batches.
        read: gets the last hidden vectors of each micro-batch on the rank that has the last stage.
        autocast: "bf16" or None.
    """

    def compute(stage: Stage, micro_batch: int, x: Tensor | None) -> Tensor:
        micro = step.micro_batches[micro_batch]
        with torch.no_grad(), autocast_context(model.device, autocast):
            tokens = micro.input_ids if x is None else x.view(*micro.input_ids.shape, -1)
            y, _ = model.run_stage(stage, tokens, micro.batch)  # pyright: ignore[reportCallIssue]
            if stage.is_last:
                read(y, micro)
        return y.flatten(0, 1)

    pipeline.forward([micro.input_ids.numel() for micro in step.micro_batches], compute)


class _Shares:
    """The cross-entropy and the routers' rows [L, 3 + E] of a step, as its stages add them."""

    def __init__(self, model: HybridModel) -> None:
        moe, self._device = model.config.moe, model.device
        self._shape = (0, 3) if moe is None else (len(model.layers), 3 + moe.num_local_experts)
        self._losses: list[Tensor] = []
        self._rows: list[tuple[range, Tensor]] = []

    def add(self, stage: Stage, loss: Tensor | None, rows: Tensor) -> None:
        """Add one stage of one micro-batch."""
        self._losses += [] if loss is None else [loss]
        self._rows.append((stage.layers, rows))

    def total(self) -> Tensor:
        """The loss, then all rows."""
        rows = torch.zeros(self._shape, dtype=self._rows[0][1].dtype, device=self._device)
        for layers, found in self._rows:
            if len(found):
                rows[layers.start : layers.stop] += found
        loss = torch.stack(self._losses).sum() if self._losses else rows.new_zeros(())
        return torch.cat([loss.to(rows.dtype)[None], rows.flatten()])
