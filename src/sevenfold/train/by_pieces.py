"""A feed-forward that keeps its input alone, and runs again in the backward some tokens at a time.

Of a recomputed block the feed-forward is widest: in the dense 1B of the ladder gate and up, their
product and their gradient take 18 times the bytes of the stream. By pieces of tokens they exist for
one piece.

A block's recomputation ends with the last tensor that it has kept, which is this input. So the
feed-forward runs as often as in a block that is recomputed whole: twice forward, once backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sevenfold.models.feed_forward import PIECE_TOKENS


def by_pieces(feed: nn.Module, x: Tensor, *, piece_tokens: int = PIECE_TOKENS) -> Tensor:
    """Return feed(x), and where x takes a gradient keep x alone.

    Args:
        feed: its result for a token depends on that token alone, and it draws no random numbers.
        x: [..., D].
        piece_tokens: of a piece, at least 1.

    Returns:
        [..., D].
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return feed(x)
    keeper = _Keeper()
    held = _Hold.apply(x, keeper)
    weights = [weight for weight in feed.parameters() if weight.requires_grad]
    return _Pieces.apply(held, feed, piece_tokens, keeper, *weights)


class _Keeper:
    """Leads from the feed-forward's node to the one that keeps its input."""

    node: Any = None


class _Hold(torch.autograd.Function):
    """x as it is, kept. A node of its own: the recomputation ends when it has kept x again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keeper: _Keeper) -> Tensor:
        ctx.save_for_backward(x)
        keeper.node = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, feed: nn.Module, size: int, keeper: _Keeper, *weights: nn.Parameter
    ) -> Tensor:
        kind = x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.feed, ctx.size, ctx.keeper = feed, size, keeper
        tokens = x.flatten(0, -2)
        return torch.cat([feed(tokens[part]) for part in _parts(tokens, size)]).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.keeper.node.saved_tensors
        tokens, dy = x.flatten(0, -2), grads[0].flatten(0, -2)
        weights = [weight for weight in ctx.feed.parameters() if weight.requires_grad]
        dx, dweights = torch.empty_like(tokens), None
        for part in _parts(tokens, ctx.size):
            piece = tokens[part].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                y = ctx.feed(piece)
            dx[part], *found = torch.autograd.grad(y, (piece, *weights), dy[part])
            if dweights is None:
                dweights = found
            else:
                for total, more in zip(dweights, found, strict=True):
                    total.add_(more)
            del y, found
        return dx.view_as(x), None, None, None, *(dweights or ())


def _parts(tokens: Tensor, size: int) -> Iterator[slice]:
    return (slice(at, at + size) for at in range(0, len(tokens), size))
