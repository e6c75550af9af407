"""Pipeline parallelism: stages of layers on different ranks, through torch.distributed.pipelining.

Micro-batches follow one another through the stages, one forward and one backward in turn (1F1B); a
rank with several stages interleaves them. Stages share no weight, so each rank's gradients, moments
and norms are its own. Source: arXiv 2104.04473 (schedules).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sevenfold.models import Batch, HybridModel
from sevenfold.models.block import Block
from sevenfold.models.router_stats import RouterCounts
from sevenfold.parallel.config import ParallelConfig
from sevenfold.parallel.layout import Layout


@dataclass(frozen=True)
class Stage:
    """Some neighbouring layers.

    index: of all stages.
    layers: of the model; embedding belongs to the first stage, last norm and head to the last.
    """

    index: int
    layers: range
    is_first: bool
    is_last: bool


def all_stages(config: ParallelConfig, num_layers: int) -> tuple[Stage, ...]:
    """Divide layers evenly; where that cannot be, the first stages have one more."""
    count = config.pipeline * config.pipeline_stages
    size, rest = divmod(num_layers, count)
    starts = [n * size + min(n, rest) for n in range(count + 1)]
    return tuple(
        Stage(n, range(starts[n], starts[n + 1]), n == 0, n == count - 1) for n in range(count)
    )


def rank_stages(config: ParallelConfig, num_layers: int, rank: int) -> tuple[Stage, ...]:
    """A pipeline rank's stages: every so many, so that they interleave."""
    return all_stages(config, num_layers)[rank :: config.pipeline]


class Absent(nn.Module):
    """In the place of a part of the model that another stage holds."""


def own_blocks(model: HybridModel) -> list[Block]:
    """The blocks of a model that this rank holds."""
    return [block for block in model.layers if not isinstance(block, Absent)]  # pyright: ignore[reportReturnType]


def keep_stages(model: HybridModel, layout: Layout) -> None:
    """Keep this rank's stages of the model; the names of what stays do too.

    Args:
        model: changed in place; model.run_stage runs one of them.
        layout: with pipeline above 1.
    """
    stages = rank_stages(layout.config, len(model.layers), layout.place.stage)
    kept = {layer for stage in stages for layer in stage.layers}
    for layer in set(range(len(model.layers))) - kept:
        model.layers[layer] = Absent()
    if not stages[0].is_first:
        model.embed_tokens = Absent()  # pyright: ignore[reportAttributeAccessIssue]
    if not stages[-1].is_last:
        model.norm, model.lm_head = Absent(), Absent()  # pyright: ignore[reportAttributeAccessIssue]
    model.run_stage = _StageRun(model)  # pyright: ignore[reportArgumentType]


class _StageRun:
    """Runs a stage of a model: a method of the model, for fully_shard to prepare its weights."""

    def __init__(self, model: HybridModel) -> None:
        self.model = model

    def __call__(
        self, stage: Stage, x: Tensor, batch: Batch
    ) -> tuple[Tensor, tuple[RouterCounts, ...]]:
        """Run ids [B, T] in the first stage, else hidden vectors [B, T, D], up to the next one."""
        if stage.is_first:
            x = self.model.embed_tokens(x)
        router = []
        for layer in stage.layers:
            x, _, counts = self.model.layers[layer](x, batch, None)
            router += [] if counts is None else [counts]
        return self.model.norm(x) if stage.is_last else x, tuple(router)


# (stage, index of the micro-batch, what the stage before computed [tokens, D] or None) -> what this
# one hands on [tokens, D], the last its loss.
Compute = Callable[[Stage, int, Tensor | None], Tensor]


class Pipeline:
    """The stages of a rank, and the order in which they run.

    Args:
        model: what this rank holds, on its device.
        layout: with pipeline above 1.
        stream: dtype of what one stage hands to the next.
    """

    def __init__(self, model: HybridModel, layout: Layout, *, stream: torch.dtype) -> None:
        config, self._num_layers = layout.config, len(model.layers)
        self.stages = rank_stages(config, self._num_layers, layout.place.stage)
        self._rank, self._config = layout.place.stage, config
        self._group = layout.group("pipeline")
        self._like = torch.empty(0, model.config.hidden_size, device=model.device, dtype=stream)
        self._schedules: dict[tuple[int, int], _Scheduled] = {}

    def forward_backward(self, num_micro_batches: int, num_tokens: int, compute: Compute) -> None:
        """Run micro-batches of equal size, and accumulate the gradients of their losses' sum.

        Args:
            num_micro_batches: as ParallelConfig.check_micro_batches allows.
            num_tokens: of a micro-batch on this rank.
            compute: one stage of one micro-batch.
        """
        key = (num_micro_batches, num_tokens)
        if key not in self._schedules:
            self._schedules[key] = self._scheduled(num_micro_batches, num_tokens)
        scheduled = self._schedules[key]
        for module in scheduled.modules:
            module.compute = compute
        order = torch.arange(num_micro_batches)
        inputs = (order,) if self.stages[0].is_first else ()
        scheduled.schedule.step(*inputs, target=order, micro_batch=order)

    def forward(self, num_tokens: Sequence[int], compute: Compute) -> None:
        """Run micro-batches of any sizes, one after the other, without a gradient."""
        before = dist.get_global_rank(self._group, (self._rank - 1) % self._config.pipeline)
        after = dist.get_global_rank(self._group, (self._rank + 1) % self._config.pipeline)
        for micro_batch, tokens in enumerate(num_tokens):
            for stage in self.stages:
                x = None
                if not stage.is_first:
                    x = self._like.new_empty(tokens, self._like.shape[1])
                    dist.recv(x, before, group=self._group)
                y = compute(stage, micro_batch, x)
                if not stage.is_last:
                    dist.send(y.contiguous(), after, group=self._group)

    def _scheduled(self, num_micro_batches: int, num_tokens: int) -> "_Scheduled":
        # It takes two seconds to import: only who needs it waits for it.
        from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B

        modules = [_StageModule(stage) for stage in self.stages]
        stages: list[Any] = [self._torch_stage(module, num_tokens) for module in modules]
        if len(stages) == 1:
            schedule = Schedule1F1B(stages[0], num_micro_batches, _as_it_is, scale_grads=False)
        else:
            schedule = ScheduleInterleaved1F1B(
                stages, num_micro_batches, _as_it_is, scale_grads=False
            )
        return _Scheduled(modules, schedule)

    def _torch_stage(self, module: "_StageModule", num_tokens: int) -> Any:
        from torch.distributed.pipelining import PipelineStage

        x = self._like.new_empty(num_tokens, self._like.shape[1]).requires_grad_()
        stage = module.stage
        return PipelineStage(
            module,
            stage.index,
            self._config.pipeline * self._config.pipeline_stages,
            self._like.device,
            # Shapes are given, so no stage is run to find them.
            input_args=torch.arange(1) if stage.is_first else x,
            output_args=x.new_empty(1).requires_grad_() if stage.is_last else x,
            group=self._group,
        )


@dataclass(frozen=True)
class _Scheduled:
    modules: list["_StageModule"]
    schedule: Any


class _StageModule(nn.Module):
    """What torch's stage calls; the model's weights are not its own."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.compute: Compute | None = None

    def forward(self, x: Tensor, *, micro_batch: Tensor) -> Tensor:
        """Run one micro-batch; its index comes as a tensor [1] on the host."""
        if self.compute is None:
            raise RuntimeError("compute must be set before a stage runs, got None")
        return self.compute(self.stage, int(micro_batch), None if self.stage.is_first else x)


def _as_it_is(loss: Tensor, micro_batch: Tensor) -> Tensor:
    return loss.sum()


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Tie a stage's own loss to what it hands on.

    forward: x        backward: dx, and 1 for the loss
    """
    return _WithLoss.apply(x, loss)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], *ctx.saved_tensors
