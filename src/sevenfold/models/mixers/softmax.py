"""Softmax attention with grouped queries and rotary positions, over all tokens or a window."""

import torch
from torch import Tensor, nn

from sevenfold.models.batch import Batch
from sevenfold.models.config import ModelConfig
from sevenfold.models.layers import Linear, frequency, rotate, rotation
from sevenfold.models.state import KVState, PagedKV, PagedTree
from sevenfold.ops import (
    attention,
    attention_cached,
    attention_chunks,
    attention_paged,
    attention_paged_tree,
    attention_pages,
    autocast,
    rotate_on_device,
    suits_chunks,
    suits_device_rotation,
    write_pages,
)


class SoftmaxAttention(nn.Module):
    """Causal grouped-query attention; rotary_dim of each head's channels carry the position.

    y = W_o attention(rotate(W_q u), rotate(W_k u), W_v u), scale 1 / sqrt(head_dim)
    """

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.rotary_dim = config.head_dim, config.rotary_dim
        self.rope_theta, self.window = config.rope_theta, window
        self.scale = config.head_dim**-0.5
        self.q_proj = Linear(config.hidden_size, self.num_heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.num_kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.num_kv_heads * self.head_dim)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size)

    def forward(
        self, x: Tensor, batch: Batch, state: KVState | PagedKV | PagedTree | None
    ) -> tuple[Tensor, KVState | PagedKV | PagedTree | None]:
        """Mix x [B, T, hidden_size]; the state's storage is written in place."""
        B, T, _ = x.shape
        # Once for the three projections, which autocast would cast x for one by one.
        (x,) = autocast(x)
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim)
        q, k = self._turned(q, k, batch.positions)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim)
        o = self.attend(q, k, v, batch, state)
        return self.o_proj(o.reshape(B, T, -1)), state

    def mix_ends(
        self, x: Tensor, batch: Batch, state: KVState | PagedKV | PagedTree, ends: Tensor
    ) -> tuple[Tensor, KVState | PagedKV | PagedTree | None]:
        """As forward, but of tokens `ends` [N] of all B * T alone: [N, 1, hidden_size].

        They are the last of each sequence: over pages they attend as in a decoding step.
        """
        keys = state.table.key_lengths if isinstance(state, PagedKV) else None
        if keys is None or not isinstance(state, PagedKV):
            y, after = self(x, batch, state)
            return y.flatten(0, 1)[ends, None], after
        (B, T, _), table, positions = x.shape, state.table, batch.positions
        k, v = (
            project(x).view(B, T, self.num_kv_heads, -1) for project in (self.k_proj, self.v_proj)
        )
        k, _ = self._turned(k, k[:, :, :0], positions)
        q = self.q_proj(x.flatten(0, 1)[ends, None]).unflatten(-1, (self.num_heads, -1))
        q, _ = self._turned(q, q[:, :, :0], positions.flatten()[ends, None])
        write_pages(k.flatten(0, 1), v.flatten(0, 1), state.k, state.v, table.page, table.place)
        how = {"scale": self.scale, "window": self.window}
        o = attention_pages(q, state.k, state.v, table.pages, keys, **how)
        return self.o_proj(o.flatten(2)), state

    def _turned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, T, H, D] as their positions turn them."""
        if not self.rotary_dim or not suits_device_rotation(q, k):
            turns = rotation(positions, self.rotary_dim, self.rope_theta, dtype=q.dtype)
            return rotate(q, turns), rotate(k, turns)
        how = {"device": q.device, "dtype": torch.float32}
        turn = frequency(self.rotary_dim, self.rope_theta, **how)
        rotate_on_device(q.flatten(0, 1), k.flatten(0, 1), positions.flatten(), turn)
        return q, k

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        state: KVState | PagedKV | PagedTree | None,
    ) -> Tensor:
        """Attend q [B, T, H, D] to rotated keys; sevenfold.parallel may stand in for it."""
        if state is None:
            how = {"lengths": batch.lengths, "scale": self.scale, "window": self.window}
            return attention(q, k, v, **how)
        if isinstance(state, PagedTree):
            return self._attend_tree(q, k, v, batch, state)
        if isinstance(state, PagedKV):
            return self._attend_pages(q, k, v, batch, state)
        if self.window is None:
            return self._attend_all(q, k, v, batch, state)
        return self._attend_window(q, k, v, batch, state)

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, state: KVState) -> Tensor:
        if max(batch.totals) > state.num_places:
            raise ValueError(
                f"state must have room for {max(batch.totals)} tokens, got {state.num_places}"
            )
        _write(state, k, v, batch)
        return attention_cached(
            q,
            state.k,
            state.v,
            lengths=batch.lengths,
            key_lengths=batch.totals,
            scale=self.scale,
        )

    def _attend_pages(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, state: PagedKV
    ) -> Tensor:
        table, tokens = state.table, (k.flatten(0, 1), v.flatten(0, 1))
        if table.key_lengths is not None:
            write_pages(*tokens, state.k, state.v, table.page, table.place)
            if table.past is not None and self._goes_by_blocks(q, batch, state):
                return attention_chunks(
                    q,
                    state.k,
                    state.v,
                    table.pages,
                    lengths=batch.lengths,
                    past=table.past,
                    scale=self.scale,
                )
            return attention_pages(
                q,
                state.k,
                state.v,
                table.pages,
                table.key_lengths,
                scale=self.scale,
                window=self.window,
                cu_seqlens=table.cu_seqlens,
            )
        at = (table.page, table.place)
        state.k[at], state.v[at] = tokens
        return attention_paged(
            q,
            state.k,
            state.v,
            table.pages,
            lengths=batch.lengths,
            key_lengths=batch.totals,
            scale=self.scale,
            window=self.window,
        )

    def _goes_by_blocks(self, q: Tensor, batch: Batch, state: PagedKV) -> bool:
        return self.window is None and suits_chunks(q, state.v, batch.lengths, batch.past)

    def _attend_tree(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, state: PagedTree
    ) -> Tensor:
        table, tokens = state.table, (k.flatten(0, 1), v.flatten(0, 1))
        if table.key_lengths is not None:
            write_pages(*tokens, state.k, state.v, table.page, table.place)
            return attention_pages(
                q,
                state.k,
                state.v,
                table.pages,
                table.key_lengths,
                scale=self.scale,
                window=self.window,
                ancestors=state.ancestors,
            )
        at = (table.page, table.place)
        state.k[at], state.v[at] = tokens
        return attention_paged_tree(
            q,
            state.k,
            state.v,
            table.pages,
            state.ancestors,
            lengths=batch.lengths,
            past=batch.past,
            scale=self.scale,
            window=self.window,
        )

    def _attend_window(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, state: KVState
    ) -> Tensor:
        if batch.is_step:
            # Keys carry their rotation, so their order in the ring does not matter.
            _write(state, k, v, batch)
            filled = tuple(min(total, state.num_places) for total in batch.totals)
            return attention_cached(
                q,
                state.k,
                state.v,
                lengths=batch.lengths,
                key_lengths=filled,
                scale=self.scale,
            )
        per_sequence = (x.flatten(0, 1).split(batch.lengths) for x in (q, k, v))
        parts = []
        for n, (q_n, k_n, v_n) in enumerate(zip(*per_sequence, strict=True)):
            places = _ring_order(batch.past[n], state.num_places).to(q.device)
            keys = torch.cat([state.k[n, places], k_n])[None]
            values = torch.cat([state.v[n, places], v_n])[None]
            o = attention_cached(
                q_n[None],
                keys,
                values,
                lengths=(len(q_n),),
                key_lengths=(keys.shape[1],),
                scale=self.scale,
                window=self.window,
            )
            parts.append(o[0])
        _write(state, k, v, batch)
        return torch.cat(parts).view_as(q)


def _write(state: KVState, k: Tensor, v: Tensor, batch: Batch) -> None:
    """Put each new token in its place; of tokens that share a ring's place, only the last."""
    S = state.num_places
    k_split, v_split = (x.flatten(0, 1).split(batch.lengths) for x in (k, v))
    for n, (past, total) in enumerate(zip(batch.past, batch.totals, strict=True)):
        first = max(past, total - S)
        at = first % S
        until = min(at + total - first, S)
        head = until - at
        for storage, new in ((state.k, k_split[n]), (state.v, v_split[n])):
            kept = new[first - past :]
            storage[n, at:until] = kept[:head]
            storage[n, : len(kept) - head] = kept[head:]


def _ring_order(past: int, num_places: int) -> Tensor:
    """The places of the last tokens, oldest first."""
    return torch.arange(max(0, past - num_places), past) % num_places
