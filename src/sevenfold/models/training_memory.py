"""Bytes of one GPU at the highest point of a training step, as a function of the configuration.

What the Triton path keeps is counted tensor by tensor: products in bf16 unless told, weights,
gradients and moments in fp32. The highest point is in the backward of a block: while its
feed-forward goes backward, or softmax attention. An allocator's own overhead comes on top, as do
the buffers of NCCL; neither is a part of torch.cuda.max_memory_allocated either.
"""

from dataclasses import dataclass
from typing import NamedTuple

from sevenfold.models.accounting import count_parameters
from sevenfold.models.config import ModelConfig
from sevenfold.models.feed_forward import PIECE_TOKENS

_FP32, _BF16, _INT64 = 4, 2, 8
_MOMENTS = 2  # of AdamW
BATCH_TOKEN_BYTES = 3 * _INT64  # ids, labels, positions
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
        update: what an optimizer holds in an update besides gradients and moments.
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
    update: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        held = self.weights + self.gradients + self.moments + self.cast_weights
        within = self.gathered + self.batch + self.kept + self.working + self.update
        return held + within + self.workspace


@dataclass(frozen=True)
class HeldWeights:
    """Elements of the weights as one rank has them.

    Args:
        own: of all that the rank keeps.
        moments: of the optimizer's moments of them.
        own_block: of a block among them, on average.
        block: of a block, whole as it is computed with, on average.
        head: of the head, whole; its gradient comes first and stays.
        gathered_bytes: where ranks divide weights, of those that are whole at once, and of
            gradients before they are divided.
    """

    own: int
    moments: int
    own_block: int
    block: int
    head: int
    gathered_bytes: int


def training_memory(
    config: ModelConfig,
    num_tokens: int,
    *,
    recompute_every: int | None = None,
    stream_bytes: int = _BF16,
    product_bytes: int = _BF16,
    context_ranks: int = 1,
    keeps_attention: bool = True,
    expert_ranks: int | None = None,
    held: HeldWeights | None = None,
    accumulates: bool = False,
) -> TrainingMemory:
    """Count what a training step of one micro-batch holds at its highest point.

    Args:
        config: the model; of a rank that has a part of it, its layers, heads and widths.
        num_tokens: of the micro-batch, over all its rows; of context ranks, those that each holds.
        recompute_every: blocks 0, k, 2 k ... are computed again in the backward; None keeps all.
        stream_bytes: of a value of the residual stream: 2 with precision.stream = "bf16", else 4.
        product_bytes: of what products take: 2 with precision.autocast = "bf16", else 4.
        context_ranks: that divide the row, one document; keys go by ring.
        keeps_attention: whether recomputed blocks keep what softmax attention gave.
        expert_ranks: over which experts are divided, and tokens travel; None where they do not.
        held: weights and moments of a rank; None is all of them, AdamW's moments, divided over
            context_ranks alone.
        accumulates: whether all gradients exist already, of micro-batches before.

    Returns:
        The bytes of the layer at which they are most.
    """
    held = _divided(config, context_ranks) if held is None else held
    step = _Step(
        config,
        num_tokens,
        recompute_every,
        stream_bytes,
        product_bytes,
        context_ranks,
        keeps_attention,
        expert_ranks,
    )
    points = [
        _at_layer(step, held, layer, accumulates=accumulates)
        for layer in range(config.num_hidden_layers)
    ]
    return max(points, key=lambda point: point.total)


def kept_bytes(
    config: ModelConfig,
    *,
    recompute_every: int | None,
    stream_bytes: int,
    product_bytes: int,
    keeps_attention: bool = True,
    expert_ranks: int | None = None,
) -> int:
    """Return what all blocks keep for the backward of one token, bytes.

    The arguments are those of training_memory.
    """
    sizes = (recompute_every, stream_bytes, product_bytes, 1, keeps_attention, expert_ranks)
    step = _Step(config, 1, *sizes)
    return sum(_kept(step, layer) for layer in range(config.num_hidden_layers))


def longest_tokens(
    config: ModelConfig,
    device_bytes: int,
    *,
    recompute_every: int | None = 1,
    stream_bytes: int = _BF16,
    context_ranks: int = 1,
    keeps_attention: bool = True,
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
        "keeps_attention": keeps_attention,
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
    product: int
    ranks: int
    keeps_attention: bool
    expert_ranks: int | None

    def recomputes(self, layer: int) -> bool:
        """Whether a block is computed again."""
        return self.every is not None and layer % self.every == 0


def _divided(config: ModelConfig, ranks: int) -> HeldWeights:
    """All weights, over so many ranks."""
    parameters = count_parameters(config)
    total, head = parameters.total, config.vocab_size * config.hidden_size
    outside = parameters.embedding + parameters.lm_head + config.hidden_size
    block = (total - outside) // config.num_hidden_layers
    # A block's weights and the next one's, its gradients and those that are on their way.
    gathered = total - config.num_hidden_layers * block + 4 * block if ranks > 1 else 0
    own = total // ranks
    return HeldWeights(own, _MOMENTS * own, block // ranks, block, head, gathered * _FP32)


def _at_layer(step: _Step, held: HeldWeights, layer: int, *, accumulates: bool) -> TrainingMemory:
    """While the backward of one layer is at its widest: later layers have gradients, no tensors."""
    config = step.config
    later = config.num_hidden_layers - layer - 1
    kept = config.hidden_size * step.stream + sum(_kept(step, number) for number in range(layer))
    cast = sum(not step.recomputes(number) or number == layer for number in range(layer + 1))
    gradients = held.head + later * held.own_block
    if accumulates:  # the head's arrives whole beside its divided sum
        gradients = held.own + (held.head if held.gathered_bytes else 0)
    return TrainingMemory(
        weights=held.own * _FP32,
        gradients=gradients * _FP32,
        moments=held.moments * _FP32,
        cast_weights=cast * held.block * _BF16 if step.product == _BF16 else 0,
        gathered=held.gathered_bytes,
        batch=step.tokens * BATCH_TOKEN_BYTES,
        kept=step.tokens * kept,
        working=max(_feeding(step, layer), _mixing(step, layer)),
    )


def _kept(step: _Step, layer: int) -> int:
    """Of one token: the block's input, and unless it is computed again what is inside."""
    given = step.config.hidden_size * step.stream
    if step.recomputes(layer):
        return given + _result(step, layer)
    return given + _inside(step, layer) + _feed_forward(step)


def _result(step: _Step, layer: int) -> int:
    """Of one token: what softmax attention over all tokens gave, which does not run again."""
    # Of fp32 on one GPU nothing is kept: there is no kernel that gives what is needed.
    keeps = step.keeps_attention and (step.product == _BF16 or step.ranks > 1)
    if not keeps or step.config.layer_types[layer] != "full_attention":
        return 0
    _, I, _ = _widths(step.config)
    return I * step.product + step.config.num_attention_heads * _FP32


def _inside(step: _Step, layer: int) -> int:
    """Of one token in one block: both norms' results as products take them, the sum, the mixer."""
    D, I, keys = _widths(step.config)
    norms = D * (2 * step.product + step.stream)
    if step.config.layer_types[layer] == "linear_attention":
        # qkv before and after SiLU, o, gate, what leaves the norm.
        return norms + 9 * I * step.product
    return norms + (2 * I + 2 * keys) * step.product + step.config.num_attention_heads * _FP32


def _widths(config: ModelConfig) -> tuple[int, int, int]:
    """Of the stream, of all queries, of all keys."""
    D, width = config.hidden_size, config.head_dim
    return D, config.num_attention_heads * width, config.num_key_value_heads * width


def _feeding(step: _Step, layer: int) -> int:
    """While the feed-forward goes backward."""
    config, inside = step.config, _inside(step, layer)
    if config.moe is not None or not step.recomputes(layer):
        widest = _widest(step)
        return step.tokens * (inside + _feed_forward(step) + widest)
    D, F = config.hidden_size, config.intermediate_size
    # What arrives, the stream's share of it, and the gradient of the input, for all tokens; of a
    # piece gate and up, their gradients, that of what leaves SwiGLU, and the output. The weights'
    # gradients are summed from piece to piece.
    piece = min(step.tokens, PIECE_TOKENS) * (5 * F + D) * step.product
    return step.tokens * (inside + 3 * D * step.stream) + piece + 3 * D * F * _FP32


def _mixing(step: _Step, layer: int) -> int:
    """While softmax attention goes backward; lightning attention never holds the most."""
    if step.config.layer_types[layer] == "linear_attention":
        return 0
    D, I, keys = _widths(step.config)
    lse = step.config.num_attention_heads * _FP32
    # What the norm gave, the stream's gradient; q, k, v, o, the gradient of o.
    held = D * (step.product + step.stream) + (3 * I + 2 * keys) * step.product + lse
    if step.ranks == 1:
        # Gradients of q, k and v; FlashAttention sums that of q in fp32.
        return step.tokens * (held + (I + 2 * keys) * step.product + I * _FP32)
    # In fp32 the gradients of own queries and keys, and of the keys that have arrived. In bf16
    # these keys, a copy that FlashAttention reads, and what it gives; of the queries half have
    # another half's keys to meet.
    sums = (I + 2 * keys + 2 * keys) * _FP32
    arrived = 3 * 2 * keys * step.product + I * (step.product + _FP32) // 2
    return step.tokens * (held + sums + arrived)


def _feed_forward(step: _Step) -> int:
    config, F = step.config, step.config.intermediate_size
    if config.moe is None:
        return 3 * F * step.product  # gate and up, and what leaves SwiGLU
    moe, k = config.moe, config.moe.num_experts_per_tok
    # Gate and up of each choice; of the router logits and probabilities, weights, and the plan.
    routed = 3 * moe.num_local_experts * _FP32
    routed += k * (2 * F * step.product + 2 * _FP32 + 2 * _INT64)
    shared = 3 * (moe.shared_intermediate_size or 0) * step.product
    return routed + shared + _travelling(step, k)


def _travelling(step: _Step, num_chosen: int) -> int:
    """Of one token's choices: rows laid out, those that come from others, and what became of all.

    As even routing has it: as many come as leave.
    """
    if step.expert_ranks is None:
        return 0
    e, row = step.expert_ranks, step.config.hidden_size * step.product
    return num_chosen * (2 * row + row * (e - 1) // e)


def _widest(step: _Step) -> int:
    """Of one token: gradients beside what is kept, while SwiGLU goes backward."""
    config = step.config
    D, F = config.hidden_size, config.intermediate_size
    arriving = 2 * D * step.stream  # of the block's output, and the stream's share of it
    if config.moe is None:
        return arriving + 2 * F * step.product
    k = config.moe.num_experts_per_tok
    # Rows of the output, the hidden rows and their gradient, gate and up.
    return arriving + k * (D + 4 * F) * step.product
