"""What a mixture of experts does beside its products, in fp32 on a CPU: one pass each, by numba.

Every function writes its last arguments; rows of `token` are distinct.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.

import numpy as np
from numba import prange

from sevenfold.ops.compiled import compiled, dot32, exp32

_F = np.float32


@compiled
def gather(x, token, rows):
    """rows [P, D] = x[token], and zeros where there is no token."""
    for r in prange(len(rows)):
        if r < len(token):
            rows[r] = x[token[r]]
        else:
            rows[r] = 0


@compiled
def scatter(rows, token, share, y):
    """y[token] += share * rows."""
    for r in prange(len(token)):
        for d in range(rows.shape[1]):
            y[token[r], d] += share[r] * rows[r, d]


@compiled
def glu(gate_up, hidden):
    """hidden [P, F] = silu(gate) * up of gate_up [P, 2 F]."""
    F = hidden.shape[1]
    for r in prange(len(hidden)):
        for f in range(F):
            gate = gate_up[r, f]
            hidden[r, f] = gate / (_F(1) + exp32(-gate)) * gate_up[r, F + f]


@compiled
def glu_backward(gate_up, dhidden, share, hidden, dgate_up, dshare):
    """Of y = share * hidden: share * hidden, the gradient of gate_up, and that of share."""
    P, F = hidden.shape
    for r in prange(P):
        weight = share[r] if r < len(share) else _F(0)
        for f in range(F):
            gate, up, dh = gate_up[r, f], gate_up[r, F + f], dhidden[r, f]
            sigmoid = _F(1) / (_F(1) + exp32(-gate))
            silu = gate * sigmoid
            hidden[r, f] = silu * up
            dgate_up[r, f] = weight * dh * up * (sigmoid + silu * (_F(1) - sigmoid))
            dgate_up[r, F + f] = weight * dh * silu
        if r < len(share):
            dshare[r] = dot32(hidden[r], dhidden[r])
        for f in range(F):
            hidden[r, f] *= weight
