"""What recorded runs take of a GPU's memory, beside weights, states and pages."""

from sevenfold.models import ModelConfig
from sevenfold.models.accounting import state_bytes

_MOST_SPLITS = 32  # shares of a sequence's keys, each with an fp32 output
_FEW_PACKED_ROWS = 512  # tokens of prompts in a run up to which their keys are shared out
_MOST_GATHERED_TOKENS = 65_536  # whose keys a long chunk has end to end at a time
_LIBRARIES = 128 << 20  # cuBLAS's workspaces on two streams, and the graphs themselves


def graph_bytes(
    config: ModelConfig, most_rows: int, prefill_tokens: int, *, element_bytes: int
) -> int:
    """Return bytes that graphs of up to most_rows rows or prefill_tokens take, in one pool.

        most_rows * (logits + one layer's activations) + prefill_tokens * (chunk_token_bytes
        + 16 H + 160) + a prefill's copy of a state + one softmax layer's shares of most_rows, or
        of up to 512 tokens of a prefill + 128 MiB for libraries

    Logits count once: those of all sizes lie in the same memory (CudaCapture). A prefill's states
    between segments take 16 bytes a token and head; ids and places take 32 bytes a token, and all
    sizes together have less than five times the tokens of the largest.

    Args:
        config: the model; H = num_attention_heads.
        most_rows: of the largest decoding step.
        prefill_tokens: of the largest prefill that is recorded, or 0.
        element_bytes: of the model's dtype.
    """
    H, D = config.num_attention_heads, config.head_dim
    chosen = _num_chosen(config)
    # qkv, gate and output of a mixer; gate, up and their product of each expert; five streams.
    widths = 6 * H * D + 3 * chosen * config.intermediate_size + 5 * config.hidden_size
    has_pages = config.count("full_attention") + config.count("sliding_attention") > 0
    shares = 4 * _MOST_SPLITS * H * (D + 1) if has_pages else 0
    logits = 4 * config.vocab_size
    token = chunk_token_bytes(config, element_bytes=element_bytes) + 16 * H + 160
    prefill = prefill_tokens * token + (state_bytes(config) if prefill_tokens else 0)
    shared = max(most_rows, min(prefill_tokens, _FEW_PACKED_ROWS)) * shares
    return most_rows * (element_bytes * widths + logits) + shared + prefill + _LIBRARIES


def gathered_logits_bytes(config: ModelConfig, most_rows: int, num_ranks: int) -> int:
    """Return what recorded runs of ranks take beside graph_bytes: logits before they are joined.

        4 most_rows vocab_size (2 + 1 / num_ranks)    where there are several

    This rank's, all ranks' as they come, and apart from each other.

    Args:
        config: the model.
        most_rows: of the largest decoding step.
        num_ranks: that have parts of the vocabulary.
    """
    if num_ranks == 1:
        return 0
    return 4 * most_rows * (2 * config.vocab_size + config.vocab_size // num_ranks)


def chunk_token_bytes(config: ModelConfig, *, element_bytes: int) -> int:
    """Return the activations of one token of a prompt's chunk, at most.

        e (6 D + 5 H D_h + k (2 D + 4 F)) + 20 H D_h

    Streams; qkv, gate and output of a mixer; rows into and out of each expert, gate, up and their
    product; queries that are turned in fp32. A mixer's and an experts' never meet: the sum has room
    for what the allocator cannot join.

    Args:
        config: the model; D = hidden_size, F = intermediate_size, k experts a token.
        element_bytes: e, of the model's dtype.
    """
    inner, D = config.num_attention_heads * config.head_dim, config.hidden_size
    fed = _num_chosen(config) * (2 * D + 4 * config.intermediate_size)
    return element_bytes * (6 * D + 5 * inner + fed) + 20 * inner


def gathered_bytes(config: ModelConfig, *, element_bytes: int) -> int:
    """Return what a long chunk takes of a prompt's keys and values out of its pages, at most.

        2 e 65,536 G D_h    where a layer attends to all tokens

    Args:
        config: the model; G = num_key_value_heads, D_h = head_dim.
        element_bytes: e, of the model's dtype.
    """
    tokens = _MOST_GATHERED_TOKENS if config.count("full_attention") else 0
    return 2 * element_bytes * tokens * config.num_key_value_heads * config.head_dim


def _num_chosen(config: ModelConfig) -> int:
    return 1 if config.moe is None else config.moe.num_experts_per_tok
