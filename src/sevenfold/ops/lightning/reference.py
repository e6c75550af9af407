"""Lightning attention as its recurrence reads: one token at a time, any dtype, differentiable.

    S_t = exp(log_decay_h) * S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

B batch, T tokens, H heads, K key width, V value width, N sequences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, decay_H: Tensor, state_BHKV: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: the state after it, and its output from that state."""
    outer_BHKV = k_BHK[..., :, None] * v_BHV[..., None, :]
    state_BHKV = decay_H[:, None, None] * state_BHKV + outer_BHKV
    o_BHV = scale * torch.einsum("bhk,bhkv->bhv", q_BHK, state_BHKV)
    return o_BHV, state_BHKV


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Run every sequence token by token.

    Args:
        q, k: [B, T, H, K]; B * T tokens hold the sequences one after another.
        v: [B, T, H, V].
        log_decay: [H].
        scale: multiplies the output.
        initial_state: [N, H, K, V] or None for zeros.
        lengths: tokens of each sequence; they sum to B * T.

    Returns:
        o [B, T, H, V] in v's dtype, final_state [N, H, K, V] in the computation's dtype.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    decay = torch.exp(log_decay.to(dtype))
    q, k, v_ = (x.to(dtype).reshape(B * T, 1, H, x.shape[-1]) for x in (q, k, v))
    outputs, states, start = [], [], 0
    for n, length in enumerate(lengths):
        state = q.new_zeros(1, H, K, V)
        if initial_state is not None:
            state = initial_state[n : n + 1].to(dtype)
        for t in range(start, start + length):
            o, state = step(q[t], k[t], v_[t], decay, state, scale)
            outputs.append(o)
        states.append(state)
        start += length
    o = torch.cat(outputs) if outputs else v_.new_zeros(0, H, V)
    final = torch.cat(states) if states else q.new_zeros(0, H, K, V)
    return o.reshape(B, T, H, V).to(v.dtype), final
