"""Lightning attention by chunks in plain PyTorch, with a backward of its own.

A chunk has C tokens, row i, column j; every exponent is >= 0, so no decay is ever inverted:

    O     = ((Q K^T) * M) V + diag(a) Q P     M_ij = decay^(i - j) for i >= j, else 0
    S_out = decay^(C - 1) P + (diag(b) K)^T V     a_i = decay^i     b_j = decay^(C - 1 - j)

P is what row 0 meets: the state before it, decayed once. In reversed time M is transposed, and i
and j count from the chunk's end. Source: Lightning Attention-2, arXiv 2401.04658, section 3;
defining P so settles the off-by-one in which published implementations differ.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sevenfold.ops.lightning.plan import Block, plan_blocks

CHUNK_TOKENS = 64
BLOCK_CHUNKS = 16  # 1,024 tokens at once: bounds the memory for chunk states

_CONTIGUOUS = torch.contiguous_format


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    lengths: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Run every sequence chunk by chunk; arguments and result as in reference.forward."""
    return _LightningAttention.apply(q, k, v, log_decay, scale, initial_state, lengths)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token for each sequence; arguments and result as in the public operator."""
    decay = torch.exp(log_decay.to(state.dtype))[:, None, None]
    q, k, values = (x.to(state.dtype) for x in (q, k, v))
    state = torch.addcmul(state * decay, k.unsqueeze(-1), values.unsqueeze(-2))
    o = (q.unsqueeze(-2) @ state).squeeze(-2)  # [B, H, V]
    return (o * scale).to(v.dtype), state


class _LightningAttention(torch.autograd.Function):
    """Saves q, k and v only; each gradient is a scan of the same kind as the forward.

    With S_t the state after token t, and G_t = decay G_{t+1} + q_t do_t^T its adjoint:
        dq_t = S_t do_t        LA(do, v, k)
        dv_t = G_t^T k_t       LA(k, q, do) over reversed time
        dk_t = G_t v_t         LA(v, do, q) over reversed time, whose state is G_t^T
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        scale: float,
        initial_state: Tensor | None,
        lengths: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, log_decay, initial_state)
        ctx.scale, ctx.lengths = scale, lengths
        scan = _Scan(log_decay, q.dtype, lengths)
        o = torch.empty_like(v, memory_format=_CONTIGUOUS)
        for block, kc, vc, P in scan.run(k, v, scan.met_first(initial_state)):
            oc = scan.attend(_chunks(q, block, scan.dtype), kc, vc, P, block)
            _write(o, oc if scale == 1.0 else oc.mul_(scale), block)
        return o, keep_empty(scan.final, initial_state, lengths)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        do, dfinal = grads
        q, k, v, log_decay, initial_state = ctx.saved_tensors
        scan = _Scan(log_decay, q.dtype, ctx.lengths)
        do = do if ctx.scale == 1.0 else do.to(scan.dtype) * ctx.scale
        dq, dk, dv = (torch.empty_like(x, memory_format=_CONTIGUOUS) for x in (q, k, v))
        for block, kc, vc, P in scan.run(k, v, scan.met_first(initial_state)):
            doc = _chunks(do, block, scan.dtype)
            _write(dq, scan.attend(doc, vc, kc, P.mT, block), block)
        back = _Scan(log_decay, q.dtype, ctx.lengths, reverse=True)
        for block, qc, doc, P in back.run(q, do, dfinal.to(back.dtype)):
            kc, vc = _chunks(k, block, back.dtype), _chunks(v, block, back.dtype)
            _write(dv, back.attend(kc, qc, doc, P, block), block)
            _write(dk, back.attend(vc, doc, qc, P.mT, block), block)
        if initial_state is None:
            return dq, dk, dv, None, None, None, None
        dinitial = keep_empty(back.decayed(back.final), dfinal, ctx.lengths)
        return dq, dk, dv, None, None, dinitial.to(initial_state.dtype), None


class _Scan:
    """One pass of the recurrence over all sequences, in one direction of time."""

    def __init__(
        self,
        log_decay: Tensor,
        dtype: torch.dtype,
        lengths: tuple[int, ...],
        reverse: bool = False,
    ) -> None:
        self.dtype = torch.promote_types(dtype, torch.float32)
        # Finite, so that an infinite decay times no distance is 1 and not NaN.
        self.log_decay = log_decay.to(self.dtype).clamp(min=torch.finfo(self.dtype).min)
        self.blocks = plan_blocks(
            lengths, CHUNK_TOKENS, BLOCK_CHUNKS, reverse, torch.device(log_decay.device)
        )
        self.num_sequences = len(lengths)
        slots = torch.arange(CHUNK_TOKENS, device=log_decay.device)
        distance = slots - slots[:, None] if reverse else slots[:, None] - slots
        self.within = self.power(distance)[:, None]  # [H, 1, C, C], M
        self.final: Tensor

    def power(self, distance: Tensor) -> Tensor:
        """decay^distance, [H, *distance.shape]; 0 where the distance is negative."""
        log_decay = self.log_decay.view(-1, *(1,) * distance.dim())
        return torch.exp(log_decay * distance.clamp(min=0)) * (distance >= 0)

    def decayed(self, state: Tensor) -> Tensor:
        """The state one token later."""
        return torch.exp(self.log_decay)[:, None, None] * state.to(self.dtype)

    def met_first(self, initial_state: Tensor | None) -> Tensor | None:
        """What the first token of each sequence meets."""
        return None if initial_state is None else self.decayed(initial_state)

    def run(
        self, k: Tensor, v: Tensor, met: Tensor | None
    ) -> Iterator[tuple[Block, Tensor, Tensor, Tensor]]:
        """Yield block, keys, values and P by chunks; afterwards `final` has the last states.

        met [N, H, K, V]: what the first token of each sequence meets.
        """
        H, K, V = *k.shape[2:], v.shape[-1]
        self.final = k.new_zeros(self.num_sequences, H, K, V, dtype=self.dtype)
        state = self.final.new_zeros(H, K, V)  # after the block before
        for block in self.blocks:
            kc, vc = _chunks(k, block, self.dtype), _chunks(v, block, self.dtype)
            local = (kc * self.power(block.to_end)[..., None]).mT @ vc  # [H, n, K, V]
            P = self._met(local, state, met, block)
            yield block, kc, vc, P
            for chunk, sequence in block.finishing:
                self.final[sequence] = self._state_after(chunk, P, local, block)
            state = self._state_after(block.last, P, local, block)

    def attend(self, qc: Tensor, kc: Tensor, vc: Tensor, P: Tensor, block: Block) -> Tensor:
        """The output of each chunk, [H, n, C, V]."""
        inter = (qc @ P).mul_(self.power(block.rows)[..., None])
        return inter.add_((qc @ kc.mT).mul_(self.within) @ vc)

    def _met(self, local: Tensor, state: Tensor, met: Tensor | None, block: Block) -> Tensor:
        H, n, K, V = local.shape
        P = (self.power(block.between) @ local.view(H, n, K * V)).view(H, n, K, V)
        if block.continues:
            P.addcmul_(self.power(block.carried)[..., None, None], state[:, None])
        if met is None:
            return P
        entered = self.power(block.entered)[..., None, None]
        return P.addcmul_(entered, met[block.sequences].transpose(0, 1))

    def _state_after(self, chunk: int, P: Tensor, local: Tensor, block: Block) -> Tensor:
        span = self.power(block.spans[chunk])[:, None, None]
        return torch.addcmul(local[:, chunk], span, P[:, chunk])


def _chunks(x: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    H, D = x.shape[-2:]
    tokens = x.reshape(-1, H, D)[block.first_token : block.first_token + block.num_tokens]
    if block.token_index is not None:
        tokens = tokens[block.token_index] * block.filled.view(-1, 1, 1)
    chunks = tokens.view(-1, CHUNK_TOKENS, H, D)  # [n, C, H, D]
    return chunks.permute(2, 0, 1, 3).to(dtype).contiguous()


def _write(o: Tensor, oc: Tensor, block: Block) -> None:
    H, D = o.shape[-2:]
    target = o.view(-1, H, D)[block.first_token : block.first_token + block.num_tokens]
    chunks = oc.permute(1, 2, 0, 3)  # [n, C, H, D]
    if block.token_index is None:
        target.view(-1, CHUNK_TOKENS, H, D).copy_(chunks)
    else:
        target.copy_(chunks.reshape(-1, H, D)[block.slot_index])


def keep_empty(states: Tensor, unchanged: Tensor | None, lengths: tuple[int, ...]) -> Tensor:
    """A sequence without tokens leaves its state as it was."""
    if unchanged is not None:
        for n, length in enumerate(lengths):
            if length == 0:
                states[n] = unchanged[n]
    return states
