"""One block of softmax attention by plain products, some queries at a time, in fp32 at least."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.ops.attention.block import Block
from sevenfold.ops.precision import full_precision

# Scores that exist at once.
_TILE_ELEMENTS = 2**22


class _Tile(NamedTuple):
    """Some queries of a sequence and the keys that they may see."""

    queries: slice
    keys: slice
    visible: Tensor | None  # [queries, keys], None if all


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Arguments and results as in attention_block."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    o, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=dtype)
    with full_precision(q.device):
        for tile in _tiles(block, q.shape[1], q.device):
            scores = _scores(q, k, tile, block.scale)
            own = torch.logsumexp(scores, -1)
            lse[:, tile.queries] = own.flatten(0, 1)
            weights = torch.exp(scores - own[..., None])
            found = torch.einsum("grij,jgd->igrd", weights, v[tile.keys].to(dtype))
            o[tile.queries] = found.flatten(1, 2).to(o.dtype)
    return o, lse


def backward(
    do: Tensor, tokens: Sequence[Tensor], o: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in attention_block_backward."""
    q, k, v = tokens
    dtype, G = lse.dtype, k.shape[1]
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
    with full_precision(q.device):
        for tile in _tiles(block, q.shape[1], q.device):
            rows, cols = tile.queries, tile.keys
            own_lse = lse[:, rows].unflatten(0, (G, -1))
            p = torch.exp(_scores(q, k, tile, block.scale) - own_lse[..., None])
            keys, values = k[cols].to(dtype), v[cols].to(dtype)
            queries, grads, out = (x[rows].to(dtype).unflatten(1, (G, -1)) for x in (q, do, o))
            dv[cols] += torch.einsum("grij,igrd->jgd", p, grads)
            mean = (grads * out).sum(-1).permute(1, 2, 0)[..., None]
            ds = p * (torch.einsum("igrd,jgd->grij", grads, values) - mean) * block.scale
            dq[rows] = torch.einsum("grij,jgd->igrd", ds, keys).flatten(1, 2).to(dq.dtype)
            dk[cols] += torch.einsum("grij,igrd->jgd", ds, queries)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, tile: _Tile, scale: float) -> Tensor:
    """[G, H / G, queries, keys], -inf where a key is not seen."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = q[tile.queries].to(dtype).unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("igrd,jgd->grij", queries, k[tile.keys].to(dtype)) * scale
    return scores if tile.visible is None else scores.masked_fill(~tile.visible, -torch.inf)


def _tiles(block: Block, num_heads: int, device: torch.device) -> Iterator[_Tile]:
    first, first_key = 0, 0
    for length, keys in zip(block.lengths, block.key_lengths, strict=True):
        size = max(1, _TILE_ELEMENTS // (num_heads * keys))
        for at in range(0, length, size):
            end = min(at + size, length)
            seen = end if block.causal else keys
            visible = None
            if block.causal:
                query = torch.arange(at, end, device=device)[:, None]
                visible = torch.arange(seen, device=device) <= query
            columns = slice(first_key, first_key + seen)
            yield _Tile(slice(first + at, first + end), columns, visible)
        first, first_key = first + length, first_key + keys
