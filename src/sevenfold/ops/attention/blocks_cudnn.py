"""Equal sequences of one block of softmax attention, at once, in cuDNN's kernel for Hopper.

On an H200 it multiplies at 540 TFLOP/s, forward and backward, where PyTorch's FlashAttention does
at 327 (benchmarks/results/kernels/nvidia-h200.json, causal, 32,768 tokens of 64 heads of 128).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sevenfold.ops.attention import cudnn
from sevenfold.ops.attention.block import Block

# cuDNN builds a plan for every shape that a thread has not met: of lengths there must be few.
_UNIT_TOKENS, _MOST_ODD = 1024, 15
# Of all heads' queries or keys in a call: in fp32 they take 2^31 bytes, beyond which nobody has
# tried. More sequences than that go one by one.
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
    if _is_too_much(q, block):
        found = [forward(*of) for of in _one_by_one((q,), (k, v), block)]
        o, lse = zip(*found, strict=True)
        return torch.cat(o), torch.cat(lse, 1)
    tokens = _batched((q, k, v), block)
    o, lse = cudnn.attend(tokens, scale=block.scale, causal=block.causal)
    return o.transpose(1, 2).flatten(0, 1), lse.transpose(0, 1).flatten(1)


def backward(
    do: Tensor, tokens: Sequence[Tensor], o: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in attention_block_backward."""
    if _is_too_much(tokens[0], block):
        each = _one_by_one((do, tokens[0], o, lse.t()), tokens[1:], block)
        found = [backward(do, (q, k, v), o, lse.t(), one) for do, q, o, lse, k, v, one in each]
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


def _is_too_much(q: Tensor, block: Block) -> bool:
    most = max(sum(block.lengths), sum(block.key_lengths))
    return len(block.lengths) > 1 and _elements(q, most) > _MOST_ELEMENTS


def _one_by_one(
    queries: Sequence[Tensor], keys: Sequence[Tensor], block: Block
) -> Iterator[tuple[Any, ...]]:
    """Each sequence's part of tensors with a row a query, of those with a row a key; its block."""
    parts = [x.split(list(block.lengths)) for x in queries]
    parts += [x.split(list(block.key_lengths)) for x in keys]
    sizes = zip(block.lengths, block.key_lengths, strict=True)
    for n, (length, key_length) in enumerate(sizes):
        one = Block([length], [key_length], block.scale, causal=block.causal)
        yield *(part[n] for part in parts), one


def _is_of_few(length: int) -> bool:
    odd = length // (length & -length)
    return length % _UNIT_TOKENS == 0 and odd <= _MOST_ODD


def _batched(tokens: Sequence[Tensor], block: Block) -> list[Tensor]:
    """[N, heads, length, D] of each."""
    N = len(block.lengths)
    return [x.contiguous().unflatten(0, (N, -1)).transpose(1, 2) for x in tokens]
