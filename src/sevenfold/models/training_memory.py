"""Bytes of one GPU at the highest point of a training step, as a function of the configuration.

What the Triton path keeps is counted tensor by tensor: products in bf16, weights, gradients and
moments in fp32. The highest point is in the backward of a block, where the gradient of its widest
tensor stands beside what the block has kept. An allocator's own overhead comes on top, and is no
part of torch.cuda.max_memory_allocated either.
"""

from dataclasses import dataclass

from sevenfold.models.accounting import count_parameters
from sevenfold.models.config import LayerType, ModelConfig

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
        batch: ids, labels and positions.
        kept: what blocks keep for the backward.
        working: what the block at the highest point holds besides.
        workspace: of the matrix products.
    """

    weights: int
    gradients: int
    moments: int
    cast_weights: int
    batch: int
    kept: int
    working: int
    workspace: int = _WORKSPACE

    @property
    def total(self) -> int:
        """All of it."""
        held = self.weights + self.gradients + self.moments + self.cast_weights
        return held + self.batch + self.kept + self.working + self.workspace


def training_memory(
    config: ModelConfig,
    num_tokens: int,
    *,
    recompute_every: int | None = None,
    stream_bytes: int = _BF16,
) -> TrainingMemory:
    """Count what a training step of one micro-batch holds at its highest point.

    Args:
        config: the model.
        num_tokens: of the micro-batch, over all its rows.
        recompute_every: blocks 0, k, 2 k ... are computed again in the backward; None keeps all.
        stream_bytes: of a value of the residual stream: 2 with precision.stream = "bf16", else 4.

    Returns:
        The bytes of the layer at which they are most.
    """
    points = [
        _at_layer(config, num_tokens, layer, recompute_every, stream_bytes)
        for layer in range(config.num_hidden_layers)
    ]
    return max(points, key=lambda point: point.total)


def longest_tokens(
    config: ModelConfig,
    device_bytes: int,
    *,
    recompute_every: int | None = 1,
    stream_bytes: int = _BF16,
    multiple: int = 4096,
) -> int:
    """Return the most tokens of a micro-batch that fit, a multiple of `multiple`; 0 if none do."""
    low, high = 0, 1
    how = {"recompute_every": recompute_every, "stream_bytes": stream_bytes}
    while training_memory(config, high * multiple, **how).total <= device_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = training_memory(config, middle * multiple, **how).total <= device_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low * multiple


def _at_layer(
    config: ModelConfig, num_tokens: int, layer: int, every: int | None, stream: int
) -> TrainingMemory:
    """While the backward of one layer is at its widest: later layers have gradients, no tensors."""
    parameters = count_parameters(config)
    per_block = _block_parameters(config)
    head = config.vocab_size * config.hidden_size
    later = config.num_hidden_layers - layer - 1
    kept = sum(
        _kept(config, kind, stream, recomputed=every is not None and number % every == 0)
        for number, kind in enumerate(config.layer_types[: layer + 1])
    )
    recomputed = every is not None and layer % every == 0
    again = _inside(config, config.layer_types[layer], stream) if recomputed else 0
    whole = sum(
        per_block
        for number in range(layer + 1)
        if every is None or number % every or number == layer
    )
    return TrainingMemory(
        weights=parameters.total * _FP32,
        gradients=(head + later * per_block) * _FP32,
        moments=_MOMENTS * parameters.total * _FP32,
        cast_weights=whole * _BF16,
        batch=num_tokens * _BATCH_VALUES * _INT64,
        kept=num_tokens * kept,
        working=num_tokens * (again + _widest(config, stream)),
    )


def _block_parameters(config: ModelConfig) -> int:
    parameters = count_parameters(config)
    outside = parameters.embedding + parameters.lm_head + config.hidden_size
    return (parameters.total - outside) // config.num_hidden_layers


def _kept(config: ModelConfig, kind: LayerType, stream: int, *, recomputed: bool) -> int:
    """Of one token: the block's input, and unless it is computed again what is inside."""
    given = config.hidden_size * stream
    return given if recomputed else given + _inside(config, kind, stream)


def _inside(config: ModelConfig, kind: LayerType, stream: int) -> int:
    """Of one token in one block: both norms' results as products take them, the sum, the rest."""
    D, I = config.hidden_size, config.num_attention_heads * config.head_dim
    norms = D * (2 * _BF16 + stream)
    if kind == "linear_attention":
        mixer = 9 * I * _BF16  # qkv before and after SiLU, o, gate, what leaves the norm
    else:
        keys = config.num_key_value_heads * config.head_dim
        turned = (I + keys) * _FP32 if config.rotary_dim else 0  # rotation keeps fp32
        mixer = (2 * I + 2 * keys) * _BF16 + turned + config.num_attention_heads * _FP32
    return norms + mixer + _feed_forward(config)


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
