"""Two statements of lightning attention that share no line with the package, and its inputs."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.ops import layer_log_decay

# Four of the 64 heads of MiniMax-Text-01, fastest and slowest included.
SAMPLED_HEADS = [0, 15, 47, 63]
DECAYS = {
    "zero": [0.0],
    "5e-5": [-5e-5],
    "first": layer_log_decay(64, 0, 80)[SAMPLED_HEADS].tolist(),
    "middle": layer_log_decay(64, 39, 80)[SAMPLED_HEADS].tolist(),
    "last": layer_log_decay(64, 78, 80)[SAMPLED_HEADS].tolist(),
    "fast": [-3.0, -40.0, -2000.0],
    "mixed": [0.0, -5e-5, -0.0039, -0.917],
}


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    initial_state: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        state_dtype = torch.promote_types(dtype, torch.float32)
        tokens = (x.to(dtype) for x in (self.q, self.k, self.v))
        return Inputs(*tokens, self.log_decay, self.initial_state.to(state_dtype))

    def leaves(self) -> list[Tensor]:
        """Copies of q, k, v and initial_state that collect gradients."""
        floating = (self.q, self.k, self.v, self.initial_state)
        return [x.detach().clone().requires_grad_() for x in floating]


def make_inputs(
    decay: str | Sequence[float],
    T: int,
    *,
    B: int = 1,
    N: int | None = None,
    K: int = 2,
    V: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Random inputs whose values every dtype of the tests holds exactly."""
    log_decay = torch.tensor(DECAYS[decay] if isinstance(decay, str) else decay)
    H, N = len(log_decay), B if N is None else N
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (N, H, K, V)]
    values = [torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes]
    return Inputs(*values[:3], log_decay, values[3]).to(dtype)


def borders(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def dense(
    x: Inputs, *, scale: float = 1.0, lengths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """O = scale * (((Q K^T) * D) V + a Q S), D_ij = exp(log_decay (i - j)), and the last states."""
    B, T = x.q.shape[:2]
    cuts = [0, *accumulate(lengths)] if lengths is not None else [T * b for b in range(B + 1)]
    q, k, v = (y.flatten(0, 1).transpose(0, 1) for y in (x.q, x.k, x.v))
    rate = x.log_decay.to(q.dtype)[:, None]
    outputs, finals = [], []
    for n, (a, b) in enumerate(pairwise(cuts)):
        place = torch.arange(b - a, dtype=q.dtype)
        distance = place[:, None] - place
        D = torch.where(distance >= 0, torch.exp(rate[..., None] * distance.clamp(min=0)), 0)
        S = x.initial_state[n].to(q.dtype)
        met = torch.exp(rate * (place + 1))[..., None] * (q[:, a:b] @ S)
        outputs.append(scale * (((q[:, a:b] @ k[:, a:b].mT) * D) @ v[:, a:b] + met))
        left = torch.exp(rate * (b - a - 1 - place))[..., None] * k[:, a:b]
        finals.append(left.mT @ v[:, a:b] + torch.exp(rate * (b - a))[..., None] * S)
    return torch.cat(outputs, dim=1).transpose(0, 1).reshape(x.v.shape), torch.stack(finals)


def recurrence(x: Inputs, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The definition, one token after another, whole rows only."""
    S, decay = x.initial_state, torch.exp(x.log_decay.to(x.q.dtype))[:, None, None]
    outputs = []
    for q, k, v in zip(x.q.unbind(1), x.k.unbind(1), x.v.unbind(1), strict=True):
        S = S * decay + k[..., None] * v[..., None, :]
        outputs.append(scale * (q[..., None] * S).sum(-2))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x.v)), S


def rounding_bound(x: Inputs, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What rounding can do at most to either statement: n eps sum|terms|, element by element."""
    T, K = x.q.shape[1], x.q.shape[3]
    absolute = Inputs(*(y.abs() for y in x[:3]), x.log_decay, x.initial_state.abs())
    factor = 4 * (T + K + 4) * torch.finfo(x.q.dtype).eps
    return tuple(factor * y for y in dense(absolute, scale=abs(scale)))
