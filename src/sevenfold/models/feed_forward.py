"""Feed-forward layers: dense SwiGLU, and a mixture of SwiGLU experts."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sevenfold.models.config import ModelConfig, MoEConfig
from sevenfold.models.layers import Linear
from sevenfold.models.padding import Padding
from sevenfold.models.router_stats import RouterCounts
from sevenfold.ops import (
    Dispatch,
    full_precision,
    linear,
    mixture,
    plan_dispatch,
    route,
    route_and_count,
    router_logits,
    swiglu,
)

# Of a recomputed dense feed-forward, which goes backward by pieces of its tokens (sevenfold.train).
# Products of so many rows are as fast as larger: a GPU's multiprocessors have hundreds of tiles.
PIECE_TOKENS = 32_768


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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Choose for x [T, D]: weights [T, k], experts [T, k], and totals in training only."""
        logits = router_logits(x, self.weight)
        if self.training:
            return route_and_count(logits, self.num_chosen)
        return *route(logits, self.num_chosen), None


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

    def forward(
        self, x: Tensor, padding: Padding | None = None
    ) -> tuple[Tensor, RouterCounts | None]:
        """Transform x [B, T, D], padding to 0; counts, and dropping, in training only."""
        tokens = x.reshape(-1, x.shape[-1])
        if padding is not None:
            tokens = padding.take_out(tokens)
        weights, experts, totals = self.gate(tokens)
        y, kept = self.routed(tokens, weights, experts, padding)
        if self.shared_mlp is not None and self.coefficient is not None:
            share = self._share(tokens, self.coefficient.weight)
            y = (1 - share) * y + share * self.shared_mlp(tokens)
        if padding is not None:
            y = padding.put_back(y)
        counts = None if totals is None else RouterCounts(totals, kept, experts.numel())
        return y.view_as(x), counts

    @staticmethod
    def _share(tokens: Tensor, weight: Tensor) -> Tensor:
        """The shared expert's share; its weight is fp32 in the published files, as the router's."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with full_precision(tokens.device):
            return torch.sigmoid(linear(tokens.to(dtype), weight.to(dtype))).to(tokens.dtype)

    def routed(
        self, tokens: Tensor, weights: Tensor, experts: Tensor, padding: Padding | None = None
    ) -> tuple[Tensor, Tensor]:
        """The experts' weighted sum, and how many choices each expert took.

        sevenfold.parallel may stand in for this, and asks what padding was taken out.
        """
        if not len(tokens):
            return self._routed_none(tokens, weights, experts)
        capacity = self.capacity(len(tokens)) if self.training else None
        dispatch = plan_dispatch(experts, self.moe.num_local_experts, capacity)
        return self.experts(tokens, weights, dispatch), dispatch.rows_per_expert

    def _routed_none(
        self, tokens: Tensor, weights: Tensor, experts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As routed, of a rank that holds padding alone: its experts take a gradient of zero."""
        tokens, weights, experts = (F.pad(x, (0, 0, 0, 1)) for x in (tokens, weights, experts))
        dispatch = plan_dispatch(experts, self.moe.num_local_experts, None)
        y = self.experts(tokens, weights, dispatch)
        return y[:0], torch.zeros_like(dispatch.rows_per_expert)

    def capacity(self, num_tokens: int) -> int | None:
        """Rows that one expert takes of num_tokens tokens; None is any number."""
        factor = self.moe.capacity_factor
        if factor is None:
            return None
        even = num_tokens * self.moe.num_experts_per_tok / self.moe.num_local_experts
        return math.ceil(factor * even)
