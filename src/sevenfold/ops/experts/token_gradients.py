"""What tokens get of the gradients of the rows that went to experts for them, fp32 on a CPU."""

import torch
from torch import Tensor

from sevenfold.ops.compiled import empty
from sevenfold.ops.experts import compiled


def token_gradients(
    drows: Tensor, dshare: Tensor, choice: Tensor, row: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens [T, D] and of their weights [T, k]; 0 for what was dropped.

    Args:
        drows, dshare: of rows [R, D], which their shares have weighed already, and of shares [R].
        choice, row: of a Dispatch.
    """
    dx, dweights = empty(len(row), drows.shape[1]), drows.new_zeros(row.shape)
    compiled.combine(*(t.numpy() for t in (drows, row, torch.ones_like(dweights), dx)))
    dweights.view(-1)[choice] = dshare
    return dx, dweights
