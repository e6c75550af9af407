"""Parallelism applied to a plain model from outside."""

from collections.abc import Sequence
from functools import partial

from sevenfold.models import HybridModel
from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.models.mixers import LightningAttention, SoftmaxAttention
from sevenfold.models.router_stats import RouterCounts, RouterStats, router_stats
from sevenfold.parallel.context.lightning import ContextLightning
from sevenfold.parallel.context.softmax import ContextSoftmax
from sevenfold.parallel.experts import divide_experts
from sevenfold.parallel.layout import Layout
from sevenfold.parallel.pipeline import keep_stages, own_blocks
from sevenfold.parallel.sharding import shard_model
from sevenfold.parallel.tensor import TensorLightning, divide_tensors, divide_weights


def divide_model(model: HybridModel, layout: Layout, *, weights_are_divided: bool = False) -> None:
    """Apply pipeline, tensor, expert and context parallelism, and share the routers' statistics.

    fully_shard comes after recomputation: see shard_weights.

    Args:
        model: whole; with weights the same on all ranks, or on the meta device. Changed in place,
            names stay.
        layout: whose degrees suit the model.
        weights_are_divided: whether each rank has loaded its part of the matrices alone.
    """
    if layout.is_alone:
        return
    layout.config.check_model(model.config)
    if layout.config.pipeline > 1:
        keep_stages(model, layout)
    for block in own_blocks(model):
        if layout.config.routes_tokens and isinstance(block.mlp, MixtureOfExperts):
            divide_experts(block.mlp, layout)
    if model.config.moe is not None:
        model.router_stats = partial(  # pyright: ignore[reportAttributeAccessIssue]
            _shared_stats, num_experts_per_tok=model.config.moe.num_experts_per_tok, layout=layout
        )
    if layout.config.tensor > 1:
        if not weights_are_divided:
            divide_weights(model, layout)
        divide_tensors(model, layout)
    if layout.config.context > 1:
        _divide_context(model, layout)


def shard_weights(model: HybridModel, layout: Layout) -> None:
    """Apply fully_shard where there is more than one rank with tokens of its own."""
    if layout.config.token_ranks > 1:
        shard_model(model, layout)


def _shared_stats(
    counts: Sequence[RouterCounts], *, num_experts_per_tok: int, layout: Layout
) -> RouterStats | None:
    """This rank's share of the statistics of all ranks' tokens; one collective for all layers."""
    if not counts:
        return None
    return router_stats(counts, num_experts_per_tok, sum_over_ranks=layout.sum_over_tokens)


def _divide_context(model: HybridModel, layout: Layout) -> None:
    group = layout.group("context")
    for block in own_blocks(model):
        mixer = block.self_attn
        if isinstance(mixer, SoftmaxAttention):
            exchange = layout.config.context_attention
            mixer.attend = ContextSoftmax(mixer.scale, mixer.window, group, exchange)
        elif isinstance(mixer, LightningAttention | TensorLightning):
            mixer.attend = ContextLightning(mixer, group)
