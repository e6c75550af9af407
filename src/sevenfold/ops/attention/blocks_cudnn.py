"""Equal sequences of one block of softmax attention, at once, in cuDNN's kernel for Hopper.

On an H200 it multiplies at 540 TFLOP/s, forward and backward, where PyTorch's FlashAttention does
at 327 (benchmarks/results/kernels/nvidia-h200.json, causal, 32,768 tokens of 64 heads of 128).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.ops.attention import cudnn
from sevenfold.ops.attention.block import Block

# cuDNN builds a plan for every shape that a thread has not met: of lengths there must be few.
_UNIT_TOKENS, _MOST_ODD = 1024, 15
# Of all heads' queries or keys in a call: in fp32 they take 2^31 bytes, beyond which nobody has
# tried. More sequences than that go in several calls.
_MOST_ELEMENTS = 2**29


def refusal(q: Tensor, v: Tensor, block: Block) -> str | None:
    """Why it cannot compute this, or should not, if so."""
    if torch.are_deterministic_algorithms_enabled():
        return "impl cudnn must not be taken under torch.use_deterministic_algorithms(True)"
    for name, lengths in (("lengths", block.lengths), ("key_lengths", block.key_lengths)):
        if len(set(lengths)) != 1 or not _is_of_few(lengths[0]):
            return (
                f"{name} must all be one product of {_UNIT_TOKENS}, a power of two and at most "
                f"{_MOST_ODD} for impl cudnn, got {list(lengths)}"
            )
    longest = max(block.lengths[0], block.key_lengths[0])
    if _elements(q, longest) > _MOST_ELEMENTS:
        return (
            f"a sequence's tokens * H * D must be at most {_MOST_ELEMENTS} for impl cudnn, got "
            f"{_elements(q, longest)}"
        )
    return cudnn.refusal(q, v)


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Arguments and results as in attention_block."""
    if len(block.lengths) > _most_sequences(q, block):
        calls = _in_turn(q, block)
        found = [forward(q[at], k[keys], v[keys], part) for at, keys, part in calls]
        o, lse = zip(*found, strict=True)
        return torch.cat(o), torch.cat(lse, 1)
    tokens = _batched((q, k, v), block)
    o, lse = cudnn.attend(tokens, scale=block.scale, causal=block.causal)
    return o.transpose(1, 2).flatten(0, 1), lse.transpose(0, 1).flatten(1)


def backward(
    do: Tensor, tokens: Sequence[Tensor], o: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in attention_block_backward."""
    q, k, v = tokens
    if len(block.lengths) > _most_sequences(q, block):
        found = [
            backward(do[at], (q[at], k[keys], v[keys]), o[at], lse[:, at], part)
            for at, keys, part in _in_turn(q, block)
        ]
        dq, dk, dv = (torch.cat(parts) for parts in zip(*found, strict=True))
        return dq, dk, dv
    do, o = _batched((do, o), block)
    lse = lse.unflatten(1, (len(block.lengths), -1)).transpose(0, 1)
    found = cudnn.gradients(
        do, _batched(tokens, block), o, lse, scale=block.scale, causal=block.causal
    )
    dq, dk, dv = (x.transpose(1, 2).flatten(0, 1) for x in found)
    return dq, dk, dv


def _elements(q: Tensor, num_tokens: int) -> int:
    return num_tokens * q.shape[1] * q.shape[2]


def _most_sequences(q: Tensor, block: Block) -> int:
    """Sequences of a call, at least one."""
    longest = max(block.lengths[0], block.key_lengths[0])
    return max(1, _MOST_ELEMENTS // _elements(q, longest))


def _in_turn(q: Tensor, block: Block) -> list[tuple[slice, slice, Block]]:
    """Queries, keys and sequences of each call."""
    length, key_length = block.lengths[0], block.key_lengths[0]
    total, most, calls = len(block.lengths), _most_sequences(q, block), []
    for first in range(0, total, most):
        end = min(first + most, total)
        part = Block(
            [length] * (end - first), [key_length] * (end - first), block.scale, block.causal
        )
        queries = slice(first * length, end * length)
        calls.append((queries, slice(first * key_length, end * key_length), part))
    return calls


def _is_of_few(length: int) -> bool:
    odd = length // (length & -length)
    return length % _UNIT_TOKENS == 0 and odd <= _MOST_ODD


def _batched(tokens: Sequence[Tensor], block: Block) -> list[Tensor]:
    """[N, heads, length, D] of each."""
    N = len(block.lengths)
    return [x.contiguous().unflatten(0, (N, -1)).transpose(1, 2) for x in tokens]
