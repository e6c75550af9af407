"""Our own operators, by their defaults: what a caller gets who names no implementation."""

import torch
from torch import Tensor

from sevenfold.bench.kernels.cases import Case
from sevenfold.bench.kernels.inputs import DecodeInputs, Inputs
from sevenfold.bench.kernels.sides import Work
from sevenfold.bench.kernels.works import operator_work, steps_work
from sevenfold.ops import lightning_attention
from sevenfold.ops.lightning.decode import lightning_attention_decode


def build(case: Case, inputs: Inputs | DecodeInputs) -> Work:
    """Whole sequences, or a decoding step that reads and writes each state."""
    if isinstance(inputs, DecodeInputs):
        return _decode(inputs)

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_attention(q, k, v, inputs.log_decay, cu_seqlens=inputs.cu_seqlens).o

    return operator_work(case, inputs, operator)


def _decode(inputs: DecodeInputs) -> Work:
    def advance(token: int, turn: int, pool: Tensor) -> Tensor:
        q, k, v = (x[token] for x in (inputs.q, inputs.k, inputs.v))
        return lightning_attention_decode(q, k, v, inputs.log_decay, pool, inputs.slots[turn])

    def check() -> Tensor:
        pool = inputs.new_pool()
        return torch.stack([advance(token, 0, pool) for token in range(len(inputs.q))])

    pool = inputs.new_pool()
    return steps_work(inputs, check, lambda turn: advance(0, turn, pool))
