"""What tokens add to a state, and what they read of one, by blocks of tokens; both in fp32.

    added    S = sum_i decay^(n - 1 - i) k_i v_i^T            i = 0 ... n - 1
    read     o_i = decay^(i + 1) q_i^T S

Of each block only the heads count whose power is a number in fp32: fast heads reach some hundred
tokens, so most blocks have a few slow heads.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sevenfold.ops import full_precision
from sevenfold.parallel.context.batch import Piece

# What has decayed by more is 0: the smallest number that fp32 holds with all its digits.
LEAST = torch.finfo(torch.float32).tiny
# Channels of a block that exist in fp32 at once.
_BLOCK_ELEMENTS = 2**25


class Decay(NamedTuple):
    """The decay of a layer's heads.

    log_decay: [H] fp32 on the device.
    on_host: the same numbers.
    """

    log_decay: Tensor
    on_host: tuple[float, ...]

    def first_head(self, distance: int) -> int:
        """The first head whose state is not 0 after so many tokens; H if all are.

        MiniMax's heads go from fast to slow, so the heads from there on are those that count.
        """
        limit = math.log(LEAST)
        alive = (h for h, a in enumerate(self.on_host) if a * distance >= limit)
        return next(alive, len(self.on_host))

    def powers(self, distances: Tensor, first_head: int = 0) -> Tensor:
        """decay^distance, [distances, H - first_head], in log_decay's dtype; 0 below LEAST."""
        power = torch.exp(distances[:, None] * self.log_decay[first_head:])
        return power * (power >= LEAST)


def added_states(k: Tensor, v: Tensor, decay: Decay, pieces: Sequence[Piece | None]) -> Tensor:
    """Return the state that each piece adds.

    Args:
        k, v: [T, H, K] and [T, H, V].
        decay: in the states' dtype.
        pieces: of those tokens; None adds nothing.

    Returns:
        [pieces, H, K, V] in decay's dtype.
    """
    return _AddedStates.apply(k, v, decay, pieces)


def add_read(
    o: Tensor, q: Tensor, states: Tensor, decay: Decay, pieces: Sequence[Piece | None]
) -> Tensor:
    """Add to o, in place, what each piece reads of the state before it.

    Args:
        o: [1, T, H, V].
        q: [T, H, K].
        states: [pieces, H, K, V]; a piece that is None reads nothing, and its state has gradient 0.
        decay: in the states' dtype.
        pieces: of those tokens.
    """
    return _AddRead.apply(o, q, states, decay, pieces)


class _AddedStates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, decay: Decay, pieces: Sequence[Piece | None]
    ) -> Tensor:
        ctx.save_for_backward(k, v)
        ctx.decay, ctx.pieces = decay, pieces
        dtype = decay.log_decay.dtype
        H, K, V = k.shape[1], k.shape[2], v.shape[2]
        states = k.new_zeros(len(pieces), H, K, V, dtype=dtype)
        with full_precision(k.device):
            for state, piece in zip(states, pieces, strict=True):
                for tokens, head, power in _blocks(piece, decay, K, from_end=True):
                    faded = k[tokens, head:].to(dtype) * power
                    values = v[tokens, head:].to(dtype)
                    state[head:] += torch.einsum("nhk,nhv->hkv", faded, values)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        k, v = ctx.saved_tensors
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        dtype = grads[0].dtype
        with full_precision(k.device):
            for dstate, piece in zip(grads[0], ctx.pieces, strict=True):
                for tokens, head, power in _blocks(piece, ctx.decay, k.shape[2], from_end=True):
                    faded = v[tokens, head:].to(dtype) * power
                    dk[tokens, head:] = torch.einsum("nhv,hkv->nhk", faded, dstate[head:]).to(
                        dk.dtype
                    )
                    faded = k[tokens, head:].to(dtype) * power
                    dv[tokens, head:] = torch.einsum("nhk,hkv->nhv", faded, dstate[head:]).to(
                        dv.dtype
                    )
        return dk, dv, None, None


class _AddRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        o: Tensor,
        q: Tensor,
        states: Tensor,
        decay: Decay,
        pieces: Sequence[Piece | None],
    ) -> Tensor:
        ctx.save_for_backward(q, states)
        ctx.decay, ctx.pieces = decay, pieces
        ctx.mark_dirty(o)
        dtype, rows = states.dtype, o[0]
        with full_precision(q.device):
            for state, piece in zip(states, pieces, strict=True):
                for tokens, head, power in _blocks(piece, decay, q.shape[2], from_end=False):
                    faded = q[tokens, head:].to(dtype) * power
                    read = torch.einsum("nhk,hkv->nhv", faded, state[head:])
                    rows[tokens, head:] = (rows[tokens, head:] + read).to(o.dtype)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, states = ctx.saved_tensors
        (do,) = grads
        dq, dstates = torch.zeros_like(q), torch.zeros_like(states)
        dtype = states.dtype
        with full_precision(q.device):
            for n, piece in enumerate(ctx.pieces):
                for tokens, head, power in _blocks(piece, ctx.decay, q.shape[2], from_end=False):
                    faded = do[0, tokens, head:].to(dtype) * power
                    dstates[n, head:] += torch.einsum(
                        "nhk,nhv->hkv", q[tokens, head:].to(dtype), faded
                    )
                    dq[tokens, head:] = torch.einsum("nhv,hkv->nhk", faded, states[n, head:]).to(
                        dq.dtype
                    )
        return do, dq, dstates, None, None


def _blocks(
    piece: Piece | None, decay: Decay, width: int, *, from_end: bool
) -> Iterator[tuple[slice, int, Tensor]]:
    """Tokens of a block, its first head that counts, and the powers [n, heads, 1].

    Counted from a piece's end the last token's power is 0, from its start the first's is 1.
    """
    if piece is None:
        return
    device = decay.log_decay.device
    size = max(1, _BLOCK_ELEMENTS // (len(decay.on_host) * width))
    for nearest in range(0, piece.length, size):
        n = min(size, piece.length - nearest)
        head = decay.first_head(nearest + (0 if from_end else 1))
        if head == len(decay.on_host):
            return
        places = torch.arange(nearest, nearest + n, device=device)
        if from_end:
            first = piece.start + piece.length - nearest - n
            places = places.flip(0)
        else:
            first = piece.start + nearest
            places = places + 1
        yield slice(first, first + n), head, decay.powers(places, head)[..., None]
