"""Our own operators, by their defaults: what a caller gets who names no implementation."""

import torch
from torch import Tensor

from sevenfold.bench.kernels.cases import WIDTH, Case, Task
from sevenfold.bench.kernels.inputs import DecodeInputs, Inputs
from sevenfold.bench.kernels.sides import Work
from sevenfold.bench.kernels.works import operator_work, steps_work
from sevenfold.ops import (
    ReplayPool,
    lightning_attention,
    lightning_attention_decode,
    lightning_attention_replay,
    lightning_attention_verify,
)

_RING_TOKENS = 16


def build(case: Case, inputs: Inputs | DecodeInputs) -> Work:
    """Whole sequences, a decoding step that reads and writes each state, or a verification."""
    if isinstance(inputs, DecodeInputs):
        return _decode(inputs) if case.task is Task.DECODE else _verify(inputs)

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_attention(q, k, v, inputs.log_decay, cu_seqlens=inputs.cu_seqlens).o

    return operator_work(case, inputs, operator)


def build_ring(_case: Case, inputs: DecodeInputs) -> Work:
    """Decoding with a ring; a run takes it round once, so that every write of a state counts."""

    def advance(token: int, turn: int, pool: ReplayPool) -> Tensor:
        q, k, v = (x[token] for x in (inputs.q, inputs.k, inputs.v))
        return lightning_attention_replay(q, k, v, inputs.log_decay, pool, inputs.slots[turn])

    def check() -> Tensor:
        pool = _ring_pool(inputs)
        return torch.stack([advance(token, 0, pool) for token in range(len(inputs.q))])

    pool = _ring_pool(inputs)
    return steps_work(inputs, check, lambda turn: advance(0, turn, pool), rounds=_RING_TOKENS)


def _decode(inputs: DecodeInputs) -> Work:
    def advance(token: int, turn: int, pool: Tensor) -> Tensor:
        q, k, v = (x[token] for x in (inputs.q, inputs.k, inputs.v))
        return lightning_attention_decode(q, k, v, inputs.log_decay, pool, inputs.slots[turn])

    def check() -> Tensor:
        pool = inputs.new_pool()
        return torch.stack([advance(token, 0, pool) for token in range(len(inputs.q))])

    pool = inputs.new_pool()
    return steps_work(inputs, check, lambda turn: advance(0, turn, pool))


def _verify(inputs: DecodeInputs) -> Work:
    """A draft of four, of whose predecessor three tokens are accepted, call after call."""
    q, k, v = (x.transpose(0, 1).contiguous() for x in (inputs.q, inputs.k, inputs.v))
    B, T = q.shape[:2]
    first_three = torch.tensor([0, 1, 2], dtype=torch.int32, device=q.device).expand(B, 3)
    accepted = first_three.contiguous()

    def check() -> Tensor:
        pool, slots = _ring_pool(inputs), inputs.slots[0]
        o = lightning_attention_verify(q, k, v, inputs.log_decay, pool, slots)
        return o.transpose(0, 1)

    def step(turn: int) -> Tensor:
        slots = inputs.slots[turn]
        return lightning_attention_verify(q, k, v, inputs.log_decay, pool, slots, accepted=accepted)

    pool = _ring_pool(inputs)
    row_bytes = (k.shape[-1] + v.shape[-1]) * k.element_size()
    draft_bytes = B * T * k.shape[2] * row_bytes
    return steps_work(inputs, check, step, rounds=_RING_TOKENS, draft_bytes=draft_bytes)


def _ring_pool(inputs: DecodeInputs) -> ReplayPool:
    heads, device = inputs.q.shape[2], inputs.q.device
    pool = ReplayPool.zeros(
        inputs.slots.numel(), heads, (WIDTH, WIDTH), ring_tokens=_RING_TOKENS, device=device
    )
    pool.state.copy_(inputs.new_pool())
    return pool
