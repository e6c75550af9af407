"""One block of softmax attention by PyTorch's FlashAttention over packed sequences, on a GPU.

These operators' names begin with an underscore; torch.nn.attention.varlen calls the same two.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sevenfold.ops.attention.block import Block

DTYPES = (torch.bfloat16, torch.float16)


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Arguments and results as in attention_block."""
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        borders(block.lengths, q.device),
        borders(block.key_lengths, q.device),
        max(block.lengths),
        max(block.key_lengths),
        0.0,
        block.causal,
        False,
        scale=block.scale,
    )
    return o, lse


def backward(
    do: Tensor, tokens: Sequence[Tensor], o: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in attention_block_backward."""
    q, k, v = tokens
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        do.contiguous(),
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        o.contiguous(),
        lse.contiguous(),
        borders(block.lengths, q.device),
        borders(block.key_lengths, q.device),
        max(block.lengths),
        max(block.key_lengths),
        0.0,
        block.causal,
        no_dropout,
        torch.empty(0, device=q.device),
        scale=block.scale,
    )


def borders(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return [N + 1] int32 on a GPU, the cumulative lengths, 0 first."""
    return sent([0, *accumulate(lengths)], device)


def sent(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers as int32 on a GPU, without waiting for it."""
    # Pinned memory: the host does not wait for the copy.
    return torch.tensor(numbers, dtype=torch.int32).pin_memory().to(device, non_blocking=True)
