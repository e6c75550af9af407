"""The lightning-attention layer of MiniMax-Text-01."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from sevenfold.models.batch import Batch
from sevenfold.models.config import ModelConfig
from sevenfold.models.drafts import DraftedState
from sevenfold.models.layers import Linear, RMSNorm
from sevenfold.models.state import LinearState, PooledState
from sevenfold.ops import (
    gated_rms_norm,
    layer_log_decay,
    lightning_attention,
    lightning_attention_step,
    silu_qkv,
)


class LightningAttention(nn.Module):
    """Linear attention with a fixed decay per head, a norm over all heads and an output gate.

        q, k, v = silu(W_qkv u)                     laid out head by head: [H, (q, k, v), D]
        y = W_out (RMSNorm(LA(q, k, v)) * sigmoid(W_gate u))

    No rotation, no scale, no softmax: position comes from the decay alone.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        inner = self.num_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, 3 * inner)
        self.output_gate = Linear(config.hidden_size, inner)
        self.norm = RMSNorm(inner, config.linear_attn_norm_eps)
        self.out_proj = Linear(inner, config.hidden_size)
        self.log_decay = layer_log_decay(self.num_heads, layer, config.num_hidden_layers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The decay is no parameter and no buffer: it follows the weights to their device, is never
        # stored, and is never cast.
        super()._apply(fn, recurse)
        device = self.qkv_proj.weight.device
        if device.type != "meta":
            self.log_decay = self.log_decay.to(device)
        return self

    def forward(
        self, x: Tensor, batch: Batch, state: LinearState | PooledState | DraftedState | None
    ) -> tuple[Tensor, LinearState | PooledState | DraftedState | None]:
        """Mix x [B, T, hidden_size]; the state comes back advanced, or None if none came in."""
        B, T, _ = x.shape
        q, k, v = silu_qkv(self.qkv_proj(x), self.num_heads)  # [B, T, H, D]
        o, state = self._attend(q, k, v, batch, state)
        o, gate = o.reshape(B, T, -1), self.output_gate(x)
        return self.out_proj(gated_rms_norm(o, gate, self.norm.weight, self.norm.eps)), state

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        state: LinearState | PooledState | DraftedState | None,
    ) -> tuple[Tensor, LinearState | PooledState | DraftedState | None]:
        if state is None:
            o = lightning_attention(q, k, v, self.log_decay, cu_seqlens=batch.cu_seqlens).o
            return o, None
        if isinstance(state, LinearState):
            o, kv = self._advance(q, k, v, batch, state.kv)
            return o, LinearState(kv)
        if isinstance(state, DraftedState):
            return state.advance((q, k, v), self.log_decay), state
        o, kv = self._advance(q, k, v, batch, state.pool[state.slots])
        state.pool[state.slots] = kv
        return o, state

    def _advance(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, kv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The output, and the states [N, H, K, V] after the batch."""
        if batch.is_step:
            q, k, v = (x.reshape(batch.num_sequences, *x.shape[2:]) for x in (q, k, v))
            result = lightning_attention_step(q, k, v, self.log_decay, kv)
        else:
            result = lightning_attention(
                q,
                k,
                v,
                self.log_decay,
                initial_state=kv,
                return_final_state=True,
                cu_seqlens=batch.cu_seqlens,
            )
        return result  # pyright: ignore[reportReturnType]
