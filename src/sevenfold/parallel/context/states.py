"""What tokens add to a state, and what they read of one, by blocks of tokens.

    added    S = sum_i decay^(n - 1 - i) k_i v_i^T            i = 0 ... n - 1
    read     o_i = decay^(i + 1) q_i^T S

Powers, states and all sums are fp32. Operands of products have the tokens' dtype, as in the kernels
of the recurrence: a decayed row is rounded to it, and so is a state that is read.

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
# Channels of a block's decayed rows.
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
                    faded = _faded(k[tokens, head:], power)
                    state[head:] += _summed(faded, v[tokens, head:])
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        k, v = ctx.saved_tensors
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        with full_precision(k.device):
            for dstate, piece in zip(grads[0], ctx.pieces, strict=True):
                for tokens, head, power in _blocks(piece, ctx.decay, k.shape[2], from_end=True):
                    own = dstate[head:].to(k.dtype)
                    _read(dk[tokens, head:], _faded(v[tokens, head:], power), own.mT)
                    _read(dv[tokens, head:], _faded(k[tokens, head:], power), own)
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
        with full_precision(q.device):
            for state, piece in zip(states, pieces, strict=True):
                for tokens, head, power in _blocks(piece, decay, q.shape[2], from_end=False):
                    faded = _faded(q[tokens, head:], power)
                    _read(o[0, tokens, head:], faded, state[head:].to(q.dtype))
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, states = ctx.saved_tensors
        (do,) = grads
        dq, dstates = torch.zeros_like(q), torch.zeros_like(states)
        with full_precision(q.device):
            for n, piece in enumerate(ctx.pieces):
                for tokens, head, power in _blocks(piece, ctx.decay, q.shape[2], from_end=False):
                    faded = _faded(do[0, tokens, head:], power)
                    dstates[n, head:] += _summed(q[tokens, head:], faded)
                    _read(dq[tokens, head:], faded, states[n, head:].to(q.dtype).mT)
        return do, dq, dstates, None, None


def _faded(x: Tensor, power: Tensor) -> Tensor:
    """x [n, H, D] times power [n, H, 1], rounded to x's dtype once."""
    return torch.mul(x, power, out=torch.empty_like(x, memory_format=torch.contiguous_format))


def _summed(a: Tensor, b: Tensor) -> Tensor:
    """sum_n a_n b_n^T of a [n, H, K] and b [n, H, V]: [H, K, V], in fp32 at least."""
    a, b = a.permute(1, 2, 0), b.transpose(0, 1)
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.bmm(a.to(dtype), b.to(dtype))


def _read(y: Tensor, x: Tensor, states: Tensor) -> None:
    """y_n += x_n^T S in place, rounded once; y [n, H, V], x [n, H, K], states [H, K, V]."""
    y.transpose(0, 1).baddbmm_(x.transpose(0, 1), states)


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
