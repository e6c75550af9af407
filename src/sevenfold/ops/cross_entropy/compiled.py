"""Cross-entropy by chunks of tokens with its gradients; fp32 on a CPU, by numba.

As eager.py, with the weight packed once for all chunks, and their logits always in one memory.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.

from math import log

import numpy as np
from numba import prange
from torch import Tensor

from sevenfold.ops.compiled import compiled, empty, exp32, max32, sum32, use_torch_threads
from sevenfold.ops.cross_entropy.one_pass import Gradients, Wanted, loss_with_gradients
from sevenfold.ops.linear import products

_CHUNK_ELEMENTS = 2**21  # 8 MB stay in a processor's cache
# Between rows of logits: without it, rows of 2^n logits compete for one place of the cache.
_GAP = 16
_F = np.float32


def forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum over counted tokens; arguments as in the public operator, flattened."""
    return loss_with_gradients(_by_chunks, hidden.contiguous(), weight, labels.contiguous())


def _by_chunks(hidden: Tensor, weight: Tensor, labels: Tensor, wanted: Wanted) -> Gradients:
    (T, D), V = hidden.shape, len(weight)
    step = min(T, max(1, _CHUNK_ELEMENTS // V))
    rows, losses = empty(step, V + _GAP), empty(T)
    right = products.prepare(weight)
    turned = products.prepare(weight.t()) if wanted.hidden else None
    dhidden = empty(T, D) if wanted.hidden else None
    dweight = empty(V, D) if wanted.weight else None
    for at in range(0, T, step):
        part = slice(at, at + step)
        logits = rows[: len(hidden[part]), :V]
        products.add_matmul_nt(logits, hidden[part], right, keep=False)
        use_torch_threads()
        _softmax_gradient(rows.numpy(), labels[part].numpy(), losses[part].numpy(), V)
        if dhidden is not None and turned is not None:
            products.add_matmul_nt(dhidden[part], logits, turned, keep=False)
        if dweight is not None:
            tokens = products.prepare(hidden[part].t())
            products.add_matmul_nt(dweight, logits.t(), tokens, keep=at > 0)
    return Gradients(losses.sum(), dhidden, dweight)


@compiled
def _softmax_gradient(logits, labels, losses, V):
    """Replace V logits of each token by softmax - onehot, and write each token's loss.

    Where the label is negative, both are zero.
    """
    for t in prange(len(labels)):
        z, label = logits[t][:V], labels[t]
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
