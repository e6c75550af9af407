"""What a model costs: parameters, FLOPs and bytes, as pure functions of its configuration.

A multiplication and its addition are two FLOPs. Attention counts the pairs that it must compute
(causal, windowed), lightning attention its recurrence; what an implementation does beyond that is
its own overhead and no model FLOP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sevenfold.models.config import LayerType, ModelConfig

# Matrices in 8 bits, one fp32 scale for each output channel: all of the layers', or the experts'.
WeightFormat = Literal["int8", "int8-experts", "fp8", "fp8-experts"]

_STATE_ELEMENT_BYTES = 4  # the linear state is fp32
_FULL_BYTES = 4  # so are the router, a shared expert's coefficient, and the scales


@dataclass(frozen=True)
class Parameters:
    """Number of parameters by part."""

    embedding: int
    lm_head: int
    linear_attention: int
    softmax_attention: int
    router: int
    experts: int
    dense_feed_forward: int
    norms: int
    active_feed_forward: int

    @property
    def total(self) -> int:
        """All parameters; a tied head counts once."""
        vocabulary = self.embedding + self.lm_head
        return vocabulary + self._mixing + self.experts + self.dense_feed_forward + self.norms

    @property
    def active(self) -> int:
        """Matrix parameters that one token uses, without embedding and head."""
        return self._mixing + self.active_feed_forward

    @property
    def _mixing(self) -> int:
        return self.linear_attention + self.softmax_attention + self.router


def count_parameters(config: ModelConfig) -> Parameters:
    """Count a model's parameters.

    Args:
        config: the model.

    Returns:
        The counts by part.
    """
    L, D = config.num_hidden_layers, config.hidden_size
    experts, active, router, dense = _feed_forward(config)
    embedding = config.vocab_size * D
    num_linear = config.count("linear_attention")
    inner = config.num_attention_heads * config.head_dim
    return Parameters(
        embedding=embedding,
        lm_head=0 if config.tie_word_embeddings else embedding,
        linear_attention=num_linear * 5 * D * inner,
        softmax_attention=(L - num_linear) * _softmax_matrices(config),
        router=L * router,
        experts=L * experts,
        dense_feed_forward=L * dense,
        norms=(2 * L + 1) * D + num_linear * inner,
        active_feed_forward=L * active,
    )


def weight_bytes(
    config: ModelConfig, weights: WeightFormat | None = None, element_bytes: int = 2
) -> int:
    """Count the bytes of a model's weights.

    Args:
        config: the model.
        weights: which matrices are in 8 bits; None leaves all as they are.
        element_bytes: of an element that is not; 2 for bf16. Routers, and a shared expert's
            coefficient, take 4 at least.

    Returns:
        Bytes; a tied head counts once.
    """
    L, D, moe = config.num_hidden_layers, config.hidden_size, config.moe
    in_full = 0 if moe is None else L * D * moe.num_local_experts
    if moe is not None and moe.shared_intermediate_size:
        in_full += L * D
    in_bytes = sum(one.number * one.rows * one.columns for one in _in_8_bits(config, weights))
    rest = count_parameters(config).total - in_full - in_bytes
    in_floats = rest * element_bytes + in_full * max(_FULL_BYTES, element_bytes)
    return in_floats + in_bytes + weight_scale_bytes(config, weights)


def weight_scale_bytes(config: ModelConfig, weights: WeightFormat | None) -> int:
    """Count the bytes of the scales among weight_bytes: 4 for each output channel in 8 bits."""
    return sum(one.number * one.rows for one in _in_8_bits(config, weights)) * _FULL_BYTES


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the layers: how many of it there are, [rows, columns], whether of experts."""

    number: int
    rows: int
    columns: int
    is_expert: bool = False


def _in_8_bits(config: ModelConfig, weights: WeightFormat | None) -> list[_Matrix]:
    if weights is None:
        return []
    return [one for one in _matrices(config) if one.is_expert or not weights.endswith("-experts")]


def _matrices(config: ModelConfig) -> list[_Matrix]:
    """All matrices of the layers but routers and coefficients."""
    L, D, moe = config.num_hidden_layers, config.hidden_size, config.moe
    inner = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    linear = config.count("linear_attention")
    found = [_Matrix(linear, 4 * inner, D), _Matrix(L, D, inner)]  # qkv and gate; every output
    found += [_Matrix(L - linear, inner + 2 * keys, D)]
    experts = L * (1 if moe is None else moe.num_local_experts)
    widths = [(experts, config.intermediate_size, moe is not None)]
    if moe is not None and moe.shared_intermediate_size:
        widths.append((L, moe.shared_intermediate_size, False))
    for number, F, is_expert in widths:
        found += [_Matrix(number, 2 * F, D, is_expert), _Matrix(number, D, F, is_expert)]
    return found


def training_flops(config: ModelConfig, lengths: Sequence[int]) -> int:
    """Count the model FLOPs of a training step: three times the forward's.

    Args:
        config: the model.
        lengths: tokens of each sequence; a packed document is a sequence of its own.

    Returns:
        FLOPs of forward and backward, head included, recomputation excluded.
    """
    return 3 * sum(prefill_flops(config, length) for length in lengths)


def prefill_flops(config: ModelConfig, num_tokens: int) -> int:
    """Count the FLOPs of running one sequence of num_tokens through the model, head included."""
    dense = num_tokens * _matmul_flops_per_token(config)
    return dense + sum(mixing_flops(config, kind, num_tokens) for kind in config.layer_types)


def decode_flops(config: ModelConfig, context_tokens: int) -> int:
    """Count the FLOPs of the token that follows context_tokens others."""
    before = prefill_flops(config, context_tokens)
    return prefill_flops(config, context_tokens + 1) - before


def state_bytes(config: ModelConfig) -> int:
    """Count the bytes of one sequence's linear state, which no context changes; fp32."""
    per_layer = config.num_attention_heads * config.head_dim**2
    return config.count("linear_attention") * per_layer * _STATE_ELEMENT_BYTES


def kv_bytes(config: ModelConfig, context_tokens: int, element_bytes: int = 2) -> int:
    """Count the bytes of one sequence's keys and values.

    Args:
        config: the model.
        context_tokens: tokens that the sequence has.
        element_bytes: of one element; 2 for bf16.

    Returns:
        Bytes over all softmax layers; a window's layers keep the window only.
    """
    per_token = 2 * config.num_key_value_heads * config.head_dim * element_bytes
    full = config.count("full_attention") * context_tokens
    sliding = config.count("sliding_attention") * min(context_tokens, config.sliding_window or 0)
    return per_token * (full + sliding)


def decode_bytes(config: ModelConfig, context_tokens: int, element_bytes: int = 2) -> int:
    """Count the bytes that decoding one token at batch 1 must move.

    active weights and head read once + state read and written + keys and values read
    """
    parameters = count_parameters(config)
    weights = parameters.active + config.vocab_size * config.hidden_size
    cache = kv_bytes(config, context_tokens, element_bytes)
    return weights * element_bytes + 2 * state_bytes(config) + cache


def state_crossover_tokens(config: ModelConfig, element_bytes: int = 2) -> int | None:
    """Return the context at which keys and values of the same model, were all its layers full,
    would take more bytes than what it keeps; None if it keeps as much at any context.
    """
    per_token = 2 * config.num_key_value_heads * config.head_dim * element_bytes
    saved_per_token = config.count("linear_attention") * per_token
    if saved_per_token == 0:
        return None
    return -(-state_bytes(config) // saved_per_token)


def _feed_forward(config: ModelConfig) -> tuple[int, int, int, int]:
    """Experts, active part, router and dense parameters of one layer's feed-forward."""
    D = config.hidden_size
    one = 3 * D * config.intermediate_size
    if config.moe is None:
        return 0, one, 0, one
    moe = config.moe
    shared = 3 * D * moe.shared_intermediate_size + D if moe.shared_intermediate_size else 0
    active = moe.num_experts_per_tok * one + shared
    return moe.num_local_experts * one, active, moe.num_local_experts * D, shared


def _softmax_matrices(config: ModelConfig) -> int:
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return config.hidden_size * 2 * (queries + keys)


def _matmul_flops_per_token(config: ModelConfig) -> int:
    head = config.vocab_size * config.hidden_size
    return 2 * (count_parameters(config).active + head)


def mixing_flops(config: ModelConfig, layer_type: LayerType, num_tokens: int) -> int:
    """Count what one layer of a kind does between its projections, for one sequence."""
    H, D = config.num_attention_heads, config.head_dim
    if layer_type == "linear_attention":
        return 4 * H * D * D * num_tokens  # k v^T, and q^T S
    window = num_tokens
    if layer_type == "sliding_attention" and config.sliding_window is not None:
        window = min(config.sliding_window, num_tokens)
    visible = window * (window + 1) // 2 + (num_tokens - window) * window
    return 4 * H * D * visible  # q k^T, and p v
