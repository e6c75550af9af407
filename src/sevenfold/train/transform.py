"""What is applied to a plain model from outside: recomputation, compilation, a bf16 stream."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sevenfold.models import HybridModel
from sevenfold.models.block import Block
from sevenfold.models.feed_forward import SwiGLU
from sevenfold.models.layers import RMSNorm
from sevenfold.models.mixers import SoftmaxAttention
from sevenfold.train.by_pieces import by_pieces
from sevenfold.train.config import RunConfig
from sevenfold.train.kept_attention import KeptAttention


def transform_model(model: HybridModel, config: RunConfig) -> None:
    """Apply what a run file asks for to its model, in place; parameters and their names stay."""
    transform_blocks(model, config)
    if config.compile.enabled:
        compile_parts(model, autocast=config.precision.autocast)


def transform_blocks(model: HybridModel, config: RunConfig) -> None:
    """Apply what fully_shard must find done: the stream's dtype, recomputation."""
    if config.precision.stream is not None:
        narrow_stream(model)
    if config.checkpointing.every_layers is not None:
        recompute_blocks(model, config.checkpointing.every_layers)


def narrow_stream(model: HybridModel) -> None:
    """Let the residual stream run in bf16: the embedding is rounded, and sums keep its dtype."""
    model.embed_tokens.register_forward_hook(lambda _module, _args, x: x.to(torch.bfloat16))


def stream_dtype(model: HybridModel, stream: str | None) -> torch.dtype:
    """Return the dtype of a model's residual stream; stream is the run file's, "bf16" or None."""
    return model.dtype if stream is None else torch.bfloat16


def recompute_blocks(model: HybridModel, every_layers: int) -> None:
    """Keep only the input of every k-th block, and run the block again in the backward.

    A dense feed-forward runs again by pieces of tokens, so that its width exists for one of them.
    Softmax attention over all tokens does not run again on a GPU: its result is kept.
    Router statistics are outputs of the first run, so recomputation does not count them twice.

    Args:
        model: changed in place; parameters and their names stay.
        every_layers: k; blocks 0, k, 2 k ... are recomputed, so 1 is all of them.
    """
    for block in list(model.layers)[::every_layers]:
        # A pipeline rank lacks some blocks.
        if isinstance(block, Block) and isinstance(block.mlp, SwiGLU):
            block.feed_dense = partial(  # pyright: ignore[reportAttributeAccessIssue]
                by_pieces, block.mlp
            )
        how = {}
        mixer = getattr(block, "self_attn", None)
        if isinstance(mixer, SoftmaxAttention) and mixer.window is None:
            mixer.attend = attend = KeptAttention(mixer)
            how["context_fn"] = attend.contexts
        # Nothing in a block draws random numbers, so there is no generator to restore.
        block.forward = partial(  # pyright: ignore[reportAttributeAccessIssue]
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **how
        )


def compile_parts(model: HybridModel, *, autocast: str | None) -> int:
    """Compile each norm and each dense feed-forward; on a CPU in fp32 the norms alone.

    There the products are oneDNN's, and Inductor (2.13) lowers those for constant weights only.

    Args:
        model: changed in place; parameters and their names stay.
        autocast: "bf16" or None.

    Returns:
        How many modules were compiled, at least 1.
    """
    onednn = model.device.type == "cpu" and autocast is None
    kinds = (RMSNorm,) if onednn else (RMSNorm, SwiGLU)
    parts: list[nn.Module] = [part for part in model.modules() if isinstance(part, kinds)]
    for part in parts:
        part.compile()
    return len(parts)
