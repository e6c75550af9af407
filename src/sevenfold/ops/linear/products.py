"""Products into memory that is there, fp32 on a CPU: by MKL where it is fastest, else by tiles."""

import torch
from torch import Tensor

from sevenfold.ops.linear import mkl


def prepare(b: Tensor) -> Tensor:
    """What add_matmul_nt reads of b [N, K]; for all products with it."""
    if mkl.FASTEST:
        return b.detach()
    from sevenfold.ops.linear import tiled

    return tiled.pack(b)


def add_matmul_nt(c: Tensor, a: Tensor, prepared: Tensor, *, keep: bool) -> Tensor:
    """C = A B^T, or C += A B^T with keep, without a gradient; c [M, N] with neighbours in a row."""
    if mkl.FASTEST:
        a = a.detach()
        return c.addmm_(a, prepared.t()) if keep else torch.mm(a, prepared.t(), out=c)
    from sevenfold.ops.linear import tiled

    return tiled.add_matmul_nt(c, a, prepared, keep=keep)
