"""Which tokens make up which chunk, and how far apart things lie: once per set of lengths."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """A run of tokens of one sequence that is computed as one matrix product."""

    sequence: int
    start: int  # tokens of its sequence before it
    size: int  # tokens in it, 1 to C
    rest: int  # tokens of its sequence after it


@dataclass(frozen=True)
class Block:
    """A row of n chunks, C token slots each, that is computed at once.

    The distances are int64 numbers of tokens, the exponents of the decay; a negative one means that
    nothing flows. "Before" is meant in the direction of the scan.
    """

    first_token: int
    num_tokens: int
    token_index: Tensor | None  # [n * C] token of each slot; None when every slot is filled
    slot_index: Tensor  # [num_tokens] slot of each token
    filled: Tensor  # [n, C] bool
    sequences: Tensor  # [n]
    rows: Tensor  # [n, C] from the chunk's first token to each slot
    to_end: Tensor  # [n, C] from each slot to the chunk's last token
    between: Tensor  # [n, n] from the last token of a chunk before (column) to the first of a chunk
    continues: bool  # the scan comes to this block in the middle of a sequence
    carried: Tensor  # [n] from the last token of the block before
    entered: Tensor  # [n] from the first token of its sequence, where that lies in this block
    spans: Tensor  # [n] from the first to the last token of the chunk
    finishing: tuple[tuple[int, int], ...]  # (chunk, sequence) where the scan leaves a sequence
    last: int  # the chunk that the scan does last


@lru_cache(maxsize=32)
def plan_blocks(
    lengths: tuple[int, ...],
    chunk_tokens: int,
    block_chunks: int,
    reverse: bool,
    device: torch.device,
) -> tuple[Block, ...]:
    """Cut sequences into chunks, and the row of chunks into blocks.

    Args:
        lengths: tokens of each sequence, 0 or more.
        chunk_tokens: C, slots of a chunk.
        block_chunks: chunks of a block at most.
        reverse: the scan runs from the last token to the first.
        device: where the blocks' tensors lie.

    Returns:
        The blocks in the order of the scan; every token stands in exactly one chunk.
    """
    chunks = tuple(_chunks(lengths, chunk_tokens))
    blocks, first_token = [], 0
    for at in range(0, len(chunks), block_chunks):
        row = chunks[at : at + block_chunks]
        block = _block(row, first_token, chunk_tokens, reverse, device)
        first_token += block.num_tokens
        blocks.append(block)
    return tuple(reversed(blocks) if reverse else blocks)


def _chunks(lengths: tuple[int, ...], chunk_tokens: int) -> Iterator[Chunk]:
    for sequence, length in enumerate(lengths):
        for start in range(0, length, chunk_tokens):
            size = min(chunk_tokens, length - start)
            yield Chunk(sequence, start, size, length - start - size)


def _block(
    row: tuple[Chunk, ...],
    first_token: int,
    chunk_tokens: int,
    reverse: bool,
    device: torch.device,
) -> Block:
    sequences = torch.tensor([chunk.sequence for chunk in row])
    sizes = torch.tensor([chunk.size for chunk in row])
    # Tokens of the sequence that the scan has passed before it comes to the chunk.
    passed = torch.tensor([chunk.rest if reverse else chunk.start for chunk in row])
    slots = torch.arange(chunk_tokens)
    from_start, to_end = slots.expand(len(row), -1), sizes[:, None] - 1 - slots
    same = sequences[:, None] == sequences
    before = torch.ones_like(same)
    before = before.triu(1) if reverse else before.tril(-1)
    first, last = (-1, 0) if reverse else (0, -1)
    from_edge = (sequences == sequences[first]) & (passed[first] > 0)
    finishing = tuple(
        (i, chunk.sequence)
        for i, chunk in enumerate(row)
        if (chunk.start if reverse else chunk.rest) == 0
    )
    filled = slots < sizes[:, None]
    return Block(
        first_token=first_token,
        num_tokens=int(sum(chunk.size for chunk in row)),
        token_index=None if bool(filled.all()) else _slot_tokens(row, chunk_tokens).to(device),
        slot_index=filled.flatten().nonzero().squeeze(1).to(device),
        filled=filled.to(device),
        sequences=sequences.to(device),
        rows=(to_end if reverse else from_start).to(device),
        to_end=(torch.where(filled, from_start, -1) if reverse else to_end).to(device),
        between=torch.where(same & before, passed[:, None] - (passed + sizes) + 1, -1).to(device),
        continues=bool(from_edge.any()),
        carried=torch.where(from_edge, passed - passed[first] + 1, -1).to(device),
        entered=torch.where(from_edge, -1, passed).to(device),
        spans=(sizes - 1).to(device),
        finishing=finishing,
        last=last,
    )


def _slot_tokens(row: tuple[Chunk, ...], chunk_tokens: int) -> Tensor:
    # An empty slot points at the chunk's last token; `filled` zeroes what is read there.
    tokens, first = [], 0
    for chunk in row:
        tokens += [first + min(slot, chunk.size - 1) for slot in range(chunk_tokens)]
        first += chunk.size
    return torch.tensor(tokens)
