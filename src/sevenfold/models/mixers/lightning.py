"""The lightning-attention layer of MiniMax-Text-01."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from sevenfold.models.batch import Batch
from sevenfold.models.config import ModelConfig
from sevenfold.models.drafts import DraftedState
from sevenfold.models.layers import Linear, RMSNorm
from sevenfold.models.state import EncodedState, LinearState, PooledState
from sevenfold.ops import (
    PaddedSnapshots,
    Snapshots,
    autocast,
    gated_rms_norm,
    layer_log_decay,
    lightning_attention,
    lightning_attention_decode,
    lightning_attention_padded,
    lightning_attention_prefill,
    lightning_attention_step,
    silu_qkv,
)

LightningState = LinearState | PooledState | EncodedState | DraftedState


class LightningAttention(nn.Module):
    """Linear attention with a fixed decay per head, a norm over all heads and an output gate.

        q, k, v = silu(W_qkv u)                     laid out head by head: [H, (q, k, v), D]
        y = W_out (RMSNorm(LA(q, k, v)) * sigmoid(W_gate u))

    No rotation, no scale, no softmax: position comes from the decay alone. With several norm groups
    RMSNorm is taken over each group of neighbouring heads alone.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        inner = self.num_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, 3 * inner)
        self.output_gate = Linear(config.hidden_size, inner)
        self.norm = RMSNorm(inner, config.linear_attn_norm_eps)
        self.norm_groups = config.linear_attn_norm_groups
        self.out_proj = Linear(inner, config.hidden_size)
        self.log_decay = layer_log_decay(self.num_heads, layer, config.num_hidden_layers)
        self._follow_weights()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._follow_weights()
        return self

    def _follow_weights(self) -> None:
        # The decay is no parameter and no buffer: it follows the weights to their device, is never
        # stored, and is never cast.
        device = self.norm.weight.device
        if device.type != "meta":
            self.log_decay = self.log_decay.to(device)

    def forward(
        self, x: Tensor, batch: Batch, state: LightningState | None
    ) -> tuple[Tensor, LightningState | None]:
        """Mix x [B, T, hidden_size]; the state comes back advanced, or None if none came in."""
        B, T, _ = x.shape
        # Once for both projections, which autocast would cast x for one by one.
        (x,) = autocast(x)
        q, k, v = self.project(x)
        o, state = self.attend(q, k, v, batch, state)
        o, gate = o.reshape(B, T, -1), self.output_gate(x)
        return self.out_proj(gated_group_norm(o, gate, self.norm, self.norm_groups)), state

    def mix_ends(
        self, x: Tensor, batch: Batch, state: LightningState, ends: Tensor
    ) -> tuple[Tensor, LightningState | None]:
        """As forward, but of tokens `ends` [N] of all B * T alone: [N, 1, hidden_size]."""
        q, k, v = self.project(x)
        o, after = self.attend(q, k, v, batch, state)
        o, x = (y.flatten(0, 1)[ends, None] for y in (o.flatten(2), x))
        o = gated_group_norm(o, self.output_gate(x), self.norm, self.norm_groups)
        return self.out_proj(o), after

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, T, H, D] of x [B, T, hidden_size]."""
        return silu_qkv(self.qkv_proj(x), self.num_heads)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        state: LightningState | None,
    ) -> tuple[Tensor, LightningState | None]:
        """Run the recurrence on q, k, v [B, T, H, D]; sevenfold.parallel may stand in for it."""
        if state is None:
            o = lightning_attention(q, k, v, self.log_decay, cu_seqlens=batch.cu_seqlens).o
            return o, None
        if isinstance(state, EncodedState):
            return state.advance((q, k, v), self.log_decay, batch), state
        if isinstance(state, LinearState):
            o, kv = advance_states((q, k, v), self.log_decay, batch, state.kv)
            return o, LinearState(kv)
        if isinstance(state, DraftedState):
            return state.advance((q, k, v), self.log_decay), state
        if state.kept is not None:
            return self._attend_in_place(q, k, v, batch, state, state.kept), state
        o, kv = advance_states((q, k, v), self.log_decay, batch, state.read())
        state.pool[state.slots] = kv
        return o, state

    def _attend_in_place(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        state: PooledState,
        kept: Snapshots | PaddedSnapshots,
    ) -> Tensor:
        tokens = (q, k, v, self.log_decay)
        if isinstance(kept, PaddedSnapshots):
            return lightning_attention_padded(
                *tokens, kept, state.pool, state.slots, initial_state=state.read()
            )
        if batch.is_step and not kept.stops:
            q, k, values = (x.flatten(0, 1) for x in (q, k, v))
            return lightning_attention_decode(
                q, k, values, self.log_decay, state.pool, state.slots
            ).view_as(v)
        o, kv = lightning_attention_prefill(
            *tokens, kept, initial_state=state.read(), cu_seqlens=batch.cu_seqlens
        )
        state.pool[state.slots] = kv  # pyright: ignore[reportArgumentType]
        return o


def gated_group_norm(x: Tensor, gate: Tensor, norm: RMSNorm, groups: int) -> Tensor:
    """gated_rms_norm of each group of neighbouring channels by itself.

    Args:
        x, gate: [..., D].
        norm: its weight has D channels.
        groups: equal parts of D.
    """
    if groups == 1:
        return gated_rms_norm(x, gate, norm.weight, norm.eps)
    parts = zip(x.chunk(groups, -1), gate.chunk(groups, -1), norm.weight.chunk(groups), strict=True)
    return torch.cat([gated_rms_norm(*part, norm.eps) for part in parts], -1)


def advance_states(
    tokens: Sequence[Tensor], log_decay: Tensor, batch: Batch, kv: Tensor
) -> tuple[Tensor, Tensor]:
    """Run q, k, v [B, T, H, D] from states kv [N, H, K, V]: the output, and the states after it."""
    q, k, v = tokens
    if batch.is_step:
        q, k, v = (x.reshape(batch.num_sequences, *x.shape[2:]) for x in tokens)
        result = lightning_attention_step(q, k, v, log_decay, kv)
    else:
        result = lightning_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=kv,
            return_final_state=True,
            cu_seqlens=batch.cu_seqlens,
        )
    return result  # pyright: ignore[reportReturnType]
