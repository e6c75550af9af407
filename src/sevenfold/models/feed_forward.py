"""Feed-forward layers: dense SwiGLU, and a mixture of SwiGLU experts."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sevenfold.models.config import ModelConfig, MoEConfig
from sevenfold.models.layers import Linear
from sevenfold.ops import (
    Dispatch,
    full_precision,
    linear,
    mixture,
    plan_dispatch,
    route,
    router_logits,
    swiglu,
)

# Of a recomputed dense feed-forward, which goes backward by pieces of its tokens (sevenfold.train).
# Products of so many rows are as fast as larger: a GPU's multiprocessors have hundreds of tiles.
PIECE_TOKENS = 32_768


class RouterStats(NamedTuple):
    """What one layer's router did with one batch; scalars, but for load [num_local_experts].

    balance_loss: E * sum_i f_i m_i; f_i the share of tokens that chose expert i, m_i its mean
        probability; num_experts_per_tok when balanced.
    z_loss: mean of logsumexp(logits)^2.
    load: f_i before any drop.
    dropped: share of the choices that were dropped.
    """

    balance_loss: Tensor
    z_loss: Tensor
    load: Tensor
    dropped: Tensor


class SwiGLU(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x), gate and up in one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [..., hidden_size]."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Experts(nn.Module):
    """The weights of E SwiGLU experts, stacked."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        E, D, F = num_experts, hidden_size, intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))

    def forward(self, x: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        """Send x [T, D] through its experts, and sum by weights [T, k]."""
        return mixture(x, weights, self.gate_up_proj, self.down_proj, dispatch)


class Router(nn.Module):
    """p = softmax(W x) in fp32; the k most probable experts, their weights summing to 1."""

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(moe.num_local_experts, hidden_size))
        self.num_chosen = moe.num_experts_per_tok

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose for x [T, D]: logits [T, E], weights [T, k] and experts [T, k]."""
        logits = router_logits(x, self.weight)
        return logits, *route(logits, self.num_chosen)


class MixtureOfExperts(nn.Module):
    """Each token to its k experts, and to a shared expert where there is one.

    y = sum_i w_i FFN_i(x)      with a shared expert: (1 - c) y + c FFN_shared(x),
                                c = sigmoid(w_c x)
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.gate = Router(config.hidden_size, moe)
        self.experts = Experts(moe.num_local_experts, config.hidden_size, config.intermediate_size)
        self.shared_mlp, self.coefficient = None, None
        if moe.shared_intermediate_size is not None:
            self.shared_mlp = SwiGLU(config.hidden_size, moe.shared_intermediate_size)
            self.coefficient = Linear(config.hidden_size, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats | None]:
        """Transform x [B, T, D]; statistics, and dropping, in training only."""
        tokens = x.reshape(-1, x.shape[-1])
        logits, weights, experts = self.gate(tokens)
        y, kept = self.routed(tokens, weights, experts)
        if self.shared_mlp is not None and self.coefficient is not None:
            share = self._share(tokens, self.coefficient.weight)
            y = (1 - share) * y + share * self.shared_mlp(tokens)
        if not self.training:
            return y.view_as(x), None
        return y.view_as(x), self.stats(logits, experts, kept)

    @staticmethod
    def _share(tokens: Tensor, weight: Tensor) -> Tensor:
        """The shared expert's share; its weight is fp32 in the published files, as the router's."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with full_precision(tokens.device):
            return torch.sigmoid(linear(tokens.to(dtype), weight.to(dtype))).to(tokens.dtype)

    def routed(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """The experts' weighted sum, and how many choices each expert took.

        sevenfold.parallel may stand in for this and for stats.
        """
        capacity = self.capacity(len(tokens)) if self.training else None
        dispatch = plan_dispatch(experts, self.moe.num_local_experts, capacity)
        return self.experts(tokens, weights, dispatch), dispatch.rows_per_expert

    def capacity(self, num_tokens: int) -> int | None:
        """Rows that one expert takes of num_tokens tokens; None is any number."""
        factor = self.moe.capacity_factor
        if factor is None:
            return None
        even = num_tokens * self.moe.num_experts_per_tok / self.moe.num_local_experts
        return math.ceil(factor * even)

    def stats(self, logits: Tensor, experts: Tensor, kept: Tensor) -> RouterStats:
        """What the router did: logits [T, E], experts [T, k] before drops, kept [E] after."""
        E = self.moe.num_local_experts
        # A comparison, for torch.bincount makes the host wait for a GPU.
        chosen = experts.flatten()[:, None] == torch.arange(E, device=experts.device)
        load = chosen.sum(0).to(logits.dtype) / len(experts)
        balance = E * (load * logits.softmax(-1).mean(0)).sum()
        z_loss = torch.logsumexp(logits, dim=-1).square().mean()
        dropped = 1 - kept.sum().to(logits.dtype) / experts.numel()
        return RouterStats(balance, z_loss, load.detach(), dropped)
