"""A row's loss and gradient while it is in the processor's cache; fp32 on a CPU, by numba."""
# What numba compiles carries no annotations: its types are those of the arrays at the call.

from math import log

import numpy as np
from numba import prange

from sevenfold.ops.compiled import compiled, exp32, max32, sum32

_F = np.float32


@compiled
def softmax_gradient(logits, labels, losses):
    """Replace logits [T, V] by softmax - onehot, and write each token's loss.

    Where the label is negative, both are zero.
    """
    for t in prange(len(logits)):
        z, label = logits[t], labels[t]
        losses[t] = 0
        if label < 0:
            z[:] = 0
        else:
            wanted, top = z[label], max32(z)
            for i in range(len(z)):
                z[i] = exp32(z[i] - top)
            total = sum32(z)
            losses[t] = top + _F(log(total)) - wanted
            share = _F(1) / total
            for i in range(len(z)):
                z[i] *= share
            z[label] -= _F(1)
