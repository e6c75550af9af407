"""Bytes of one GPU at the highest point of a training step, as a function of the configuration.

What the Triton path keeps is counted tensor by tensor: products in bf16, weights, gradients and
moments in fp32. The highest point is in the backward of a block: while its feed-forward goes
backward, or softmax attention. An allocator's own overhead comes on top, as do the buffers of NCCL;
neither is a part of torch.cuda.max_memory_allocated either.
"""

from dataclasses import dataclass
from typing import NamedTuple

from sevenfold.models.accounting import count_parameters
from sevenfold.models.config import ModelConfig
from sevenfold.models.feed_forward import PIECE_TOKENS

_FP32, _BF16, _INT64 = 4, 2, 8
_MOMENTS = 2  # of AdamW
_BATCH_VALUES = 3  # ids, labels, positions
_WORKSPACE = 2**25  # of cuBLAS on Hopper


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by kind.

    Args:
        weights, gradients, moments: in fp32; gradients are those that exist at the highest point.
        cast_weights: bf16 copies that exist there.
        gathered: weights that ranks divide, where they are whole, and gradients before they are
            divided.
        batch: ids, labels and positions.
        kept: what blocks keep for the backward: their inputs, and what is inside of earlier ones.
        working: what the block at the highest point holds besides its input.
        workspace: of the matrix products.
    """

    weights: int
    gradients: int
    moments: int
    cast_weights: int
    gathered: int
    batch: int
    kept: int
    working: int
    workspace: int = _WORKSPACE

    @property
    def total(self) -> int:
        """All of it."""
        held = self.weights + self.gradients + self.moments + self.cast_weights
        return held + self.gathered + self.batch + self.kept + self.working + self.workspace


def training_memory(
    config: ModelConfig,
    num_tokens: int,
    *,
    recompute_every: int | None = None,
    stream_bytes: int = _BF16,
    context_ranks: int = 1,
) -> TrainingMemory:
    """Count what a training step of one micro-batch holds at its highest point.

    Args:
        config: the model.
        num_tokens: of the micro-batch, over all its rows; of context ranks, those that each holds.
        recompute_every: blocks 0, k, 2 k ... are computed again in the backward; None keeps all.
        stream_bytes: of a value of the residual stream: 2 with precision.stream = "bf16", else 4.
        context_ranks: that divide the row, one document, and the weights; keys go by ring.

    Returns:
        The bytes of the layer at which they are most.
    """
    step = _Step(config, num_tokens, recompute_every, stream_bytes, context_ranks)
    points = [_at_layer(step, layer) for layer in range(config.num_hidden_layers)]
    return max(points, key=lambda point: point.total)


def longest_tokens(
    config: ModelConfig,
    device_bytes: int,
    *,
    recompute_every: int | None = 1,
    stream_bytes: int = _BF16,
    context_ranks: int = 1,
    multiple: int = 4096,
) -> int:
    """Return the most tokens of a micro-batch that fit, a multiple of `multiple`; 0 if none do.

    Of context ranks these are the tokens of one.
    """
    low, high = 0, 1
    how = {
        "recompute_every": recompute_every,
        "stream_bytes": stream_bytes,
        "context_ranks": context_ranks,
    }
    while training_memory(config, high * multiple, **how).total <= device_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = training_memory(config, middle * multiple, **how).total <= device_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low * multiple


class _Step(NamedTuple):
    """What training_memory was asked for."""

    config: ModelConfig
    tokens: int
    every: int | None
    stream: int
    ranks: int

    def recomputes(self, layer: int) -> bool:
        """Whether a block is computed again."""
        return self.every is not None and layer % self.every == 0


def _at_layer(step: _Step, layer: int) -> TrainingMemory:
    """While the backward of one layer is at its widest: later layers have gradients, no tensors."""
    config, ranks = step.config, step.ranks
    total, per_block = count_parameters(config).total, _block_parameters(config)
    outer = total - config.num_hidden_layers * per_block
    later = config.num_hidden_layers - layer - 1
    kept = config.hidden_size * step.stream + sum(_kept(step, number) for number in range(layer))
    cast = sum(
        per_block for number in range(layer + 1) if not step.recomputes(number) or number == layer
    )
    # A block's weights and the next one's, its gradients and those that are on their way.
    gathered = outer + 4 * per_block if ranks > 1 else 0
    head = config.vocab_size * config.hidden_size
    return TrainingMemory(
        weights=total * _FP32 // ranks,
        gradients=(head + later * per_block // ranks) * _FP32,
        moments=_MOMENTS * total * _FP32 // ranks,
        cast_weights=cast * _BF16,
        gathered=gathered * _FP32,
        batch=step.tokens * _BATCH_VALUES * _INT64,
        kept=step.tokens * kept,
        working=max(_feeding(step, layer), _mixing(step, layer)),
    )


def _block_parameters(config: ModelConfig) -> int:
    parameters = count_parameters(config)
    outside = parameters.embedding + parameters.lm_head + config.hidden_size
    return (parameters.total - outside) // config.num_hidden_layers


def _kept(step: _Step, layer: int) -> int:
    """Of one token: the block's input, and unless it is computed again what is inside."""
    given = step.config.hidden_size * step.stream
    if step.recomputes(layer):
        return given
    return given + _inside(step, layer) + _feed_forward(step.config)


def _inside(step: _Step, layer: int) -> int:
    """Of one token in one block: both norms' results as products take them, the sum, the mixer."""
    D, I, keys = _widths(step.config)
    norms = D * (2 * _BF16 + step.stream)
    if step.config.layer_types[layer] == "linear_attention":
        return norms + 9 * I * _BF16  # qkv before and after SiLU, o, gate, what leaves the norm
    return norms + (2 * I + 2 * keys) * _BF16 + step.config.num_attention_heads * _FP32


def _widths(config: ModelConfig) -> tuple[int, int, int]:
    """Of the stream, of all queries, of all keys."""
    D, width = config.hidden_size, config.head_dim
    return D, config.num_attention_heads * width, config.num_key_value_heads * width


def _feeding(step: _Step, layer: int) -> int:
    """While the feed-forward goes backward."""
    config, inside = step.config, _inside(step, layer)
    if config.moe is not None or not step.recomputes(layer):
        widest = _widest(config, step.stream)
        return step.tokens * (inside + _feed_forward(config) + widest)
    D, F = config.hidden_size, config.intermediate_size
    # What arrives, the stream's share of it, and the gradient of the input, for all tokens; of a
    # piece gate and up, their gradients, that of what leaves SwiGLU, and the output. The weights'
    # gradients are summed from piece to piece.
    piece = min(step.tokens, PIECE_TOKENS) * (5 * F + D) * _BF16
    return step.tokens * (inside + 3 * D * step.stream) + piece + 3 * D * F * _FP32


def _mixing(step: _Step, layer: int) -> int:
    """While softmax attention goes backward; lightning attention never holds the most."""
    if step.config.layer_types[layer] == "linear_attention":
        return 0
    D, I, keys = _widths(step.config)
    lse = step.config.num_attention_heads * _FP32
    # What the norm gave, the stream's gradient; q, k, v, o, the gradient of o.
    held = D * (_BF16 + step.stream) + (3 * I + 2 * keys) * _BF16 + lse
    if step.ranks == 1:
        # Gradients of q, k and v; FlashAttention sums that of q in fp32.
        return step.tokens * (held + (I + 2 * keys) * _BF16 + I * _FP32)
    # In fp32 the gradients of own queries and keys, and of the keys that have arrived. In bf16
    # these keys, a copy that FlashAttention reads, and what it gives; of the queries half have
    # another half's keys to meet.
    sums = (I + 2 * keys + 2 * keys) * _FP32
    arrived = 3 * 2 * keys * _BF16 + I * (_BF16 + _FP32) // 2
    return step.tokens * (held + sums + arrived)


def _feed_forward(config: ModelConfig) -> int:
    F = config.intermediate_size
    if config.moe is None:
        return 3 * F * _BF16  # gate and up, and what leaves SwiGLU
    moe, k = config.moe, config.moe.num_experts_per_tok
    # Gate and up of each choice; of the router logits and probabilities, weights, and the plan.
    routed = k * 2 * F * _BF16 + 3 * moe.num_local_experts * _FP32 + k * (2 * _FP32 + 2 * _INT64)
    shared = 3 * (moe.shared_intermediate_size or 0) * _BF16
    return routed + shared


def _widest(config: ModelConfig, stream: int) -> int:
    """Of one token: gradients beside what is kept, while SwiGLU goes backward."""
    D, F = config.hidden_size, config.intermediate_size
    arriving = 2 * D * stream  # of the block's output, and the stream's share of it
    if config.moe is None:
        return arriving + 2 * F * _BF16
    k = config.moe.num_experts_per_tok
    # Rows of the output, the hidden rows and their gradient, gate and up.
    return arriving + k * (D + 4 * F) * _BF16
