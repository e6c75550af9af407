"""SGLang's seg_la (https://pypi.org/p/sglang): prefill, decoding, verification of a draft chain."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sevenfold.bench.kernels.cases import Case, Task
from sevenfold.bench.kernels.inputs import DecodeInputs, Inputs
from sevenfold.bench.kernels.sides import Work
from sevenfold.bench.kernels.works import operator_work, steps_work
from sevenfold.config import UnsupportedError

_seg_la = import_module("sglang.kernels.ops.attention.linear.seg_la")


def build(case: Case, inputs: Any) -> Work:
    """Its one entry, which picks the kernel by the tokens of a sequence; it has no backward."""
    if case.task in (Task.BACKWARD, Task.MEMORY):
        raise UnsupportedError(f"task must be forward, decode or verify, got {case.task}")
    if case.task is Task.FORWARD:
        return _prefill(case, inputs)
    return _decode(inputs) if case.task is Task.DECODE else _verify(inputs)


def _prefill(case: Case, inputs: Inputs) -> Work:
    lengths = torch.tensor(case.lengths or (case.T,) * case.B, device=inputs.q.device)
    pool = inputs.q.new_zeros(len(lengths), case.H, *_state_shape(inputs), dtype=torch.float32)
    slots = torch.arange(len(lengths), device=inputs.q.device)
    meta = _meta(lengths, slots, continued=False)
    slopes = -inputs.log_decay

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return _seg_la.seg_la_fwd(*flat, pool, slopes, meta, softmax_scale=1.0).view_as(v)

    return operator_work(case, inputs, operator)


def _decode(inputs: DecodeInputs) -> Work:
    slopes = -inputs.log_decay
    ones = torch.ones_like(inputs.slots[0])
    metas = [_meta(ones, slots, continued=True) for slots in inputs.slots]

    def advance(token: int, turn: int, pool: Tensor) -> Tensor:
        q, k, v = (x[token] for x in (inputs.q, inputs.k, inputs.v))
        return _seg_la.seg_la_fwd(q, k, v, pool, slopes, metas[turn], softmax_scale=1.0)

    def check() -> Tensor:
        pool = inputs.new_pool()
        return torch.stack([advance(token, 0, pool) for token in range(len(inputs.q))])

    pool = inputs.new_pool()
    return steps_work(inputs, check, lambda turn: advance(0, turn, pool))


def _verify(inputs: DecodeInputs) -> Work:
    """Its verification writes a state per draft token; the accepted one is copied into the pool."""
    (S, B), slopes = inputs.q.shape[:2], -inputs.log_decay
    q, k, v = (x.transpose(0, 1).flatten(0, 1).contiguous() for x in (inputs.q, inputs.k, inputs.v))
    drafted = torch.full_like(inputs.slots[0], S)
    metas = [_meta(drafted, slots, continued=True) for slots in inputs.slots]
    caches = q.new_empty(B, S, inputs.q.shape[2], *_state_shape(inputs), dtype=torch.float32)
    rows = torch.arange(B, device=q.device)

    def verify(turn: int, pool: Tensor) -> Tensor:
        return _seg_la.seg_la_fwd(
            q, k, v, pool, slopes, metas[turn], caches, rows, softmax_scale=1.0
        )

    def check() -> Tensor:
        return verify(0, inputs.new_pool()).unflatten(0, (B, S)).transpose(0, 1)

    def step(turn: int) -> None:
        verify(turn, pool)
        pool.index_copy_(0, inputs.slots[turn], caches[:, S // 2])

    pool = inputs.new_pool()
    return steps_work(inputs, check, step, draft_bytes=caches.nbytes)


def _meta(lengths: Tensor, slots: Tensor, *, continued: bool) -> Any:
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return _seg_la.SegLaMeta(
        batch_size=len(lengths),
        max_q_length=int(lengths.max()),
        q_offsets=offsets,
        s_offsets=slots,
        q_lengths=lengths,
        s_scales=torch.full_like(slots, int(continued)),
    )


def _state_shape(inputs: Inputs | DecodeInputs) -> tuple[int, int]:
    return inputs.k.shape[-1], inputs.v.shape[-1]
