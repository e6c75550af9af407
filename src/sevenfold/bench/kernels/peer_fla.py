"""flash-linear-attention's simple GLA with a fixed decay (fla-core, https://pypi.org/p/fla-core)."""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sevenfold.bench.kernels.cases import Case
from sevenfold.bench.kernels.inputs import DecodeInputs, Inputs
from sevenfold.bench.kernels.sides import Work
from sevenfold.bench.kernels.works import operator_work, steps_work

_gla = import_module("fla.ops.simple_gla")


def build_chunk(case: Case, inputs: Inputs) -> Work:
    """Its chunked form with its own chunk of 64 tokens."""
    return _operator(case, inputs, _gla.chunk_simple_gla)


def build_chunk_128(case: Case, inputs: Inputs) -> Work:
    """Its chunked form with chunks of 128 tokens."""
    return _operator(case, inputs, partial(_gla.chunk_simple_gla, chunk_size=128))


def build_fused_chunk(case: Case, inputs: Inputs) -> Work:
    """Its chunked form in one kernel."""
    return _operator(case, inputs, _gla.fused_chunk_simple_gla)


def build_recurrent(_case: Case, inputs: DecodeInputs) -> Work:
    """One token at a time. It returns a new state; writing it to a pool would come on top."""
    gamma = inputs.log_decay

    def advance(token: int, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x[token].unsqueeze(1) for x in (inputs.q, inputs.k, inputs.v))
        return _gla.fused_recurrent_simple_gla(
            q, k, v, g_gamma=gamma, scale=1.0, initial_state=state, output_final_state=True
        )

    def check() -> Tensor:
        state, outputs = inputs.new_pool()[inputs.slots[0]], []
        for token in range(len(inputs.q)):
            o, state = advance(token, state)
            outputs.append(o.squeeze(1))
        return torch.stack(outputs)

    states = inputs.new_pool().view(*inputs.slots.shape, *_state_shape(inputs))
    return steps_work(inputs, check, lambda turn: advance(0, states[turn]))


def _operator(case: Case, inputs: Inputs, function: Any) -> Work:
    packing = {}
    if inputs.cu_seqlens is not None:
        packing["cu_seqlens"] = inputs.cu_seqlens.to(inputs.q.device, torch.long)

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, g_gamma=inputs.log_decay, scale=1.0, **packing)[0]

    return operator_work(case, inputs, operator)


def _state_shape(inputs: DecodeInputs) -> tuple[int, int, int]:
    return inputs.q.shape[2], inputs.k.shape[-1], inputs.v.shape[-1]
