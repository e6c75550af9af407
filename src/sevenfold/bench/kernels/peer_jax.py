"""jax-linear-attention's Mosaic GPU kernels (https://pypi.org/p/jax-linear-attention)."""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sevenfold.bench.kernels.cases import Case, Task
from sevenfold.bench.kernels.inputs import Inputs
from sevenfold.bench.kernels.sides import Work

# JAX would take three quarters of the memory, in which torch draws the inputs; it has no other
# switch than this variable of its own.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
_jax = import_module("jax")
_jla = import_module("jla.ops")


def build(case: Case, inputs: Inputs) -> Work:
    """Its operator, compiled for the case; the gates [B, T, H] are given, as its own layers do."""
    arrays = [_to_jax(x) for x in (inputs.q, inputs.k, inputs.v, _gates(inputs))]
    segments = None if inputs.cu_seqlens is None else _to_jax(_segment_ids(inputs))

    def operator(q: Any, k: Any, v: Any, g: Any) -> Any:
        return _jla.linear_attention(
            "simple_gla", q, k, v, g=g, scale=1.0, impl="mosaic_gpu", segment_ids=segments
        )[0]

    def gradients(q: Any, k: Any, v: Any, g: Any, do: Any) -> tuple[Any, ...]:
        o, pull = _jax.vjp(lambda q, k, v: operator(q, k, v, g), q, k, v)
        return (o, *pull(do))

    function = operator
    if case.task is not Task.FORWARD:
        assert inputs.do is not None
        function = gradients
        arrays.append(_to_jax(inputs.do))
    compiled = _jax.jit(function)

    def check() -> Mapping[str, Tensor]:
        found = _jax.tree.leaves(_jax.block_until_ready(compiled(*arrays)))
        names = ("o", "dq", "dk", "dv")[: len(found)]
        return {n: torch.from_dlpack(x) for n, x in zip(names, found, strict=True)}

    def extra_bytes() -> int:
        return compiled.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    weigh = extra_bytes if case.task is Task.MEMORY else None
    return Work(check, lambda: compiled(*arrays), wait=_jax.block_until_ready, extra_bytes=weigh)


def _gates(inputs: Inputs) -> Tensor:
    return inputs.log_decay.expand(inputs.q.shape[:3]).contiguous()


def _segment_ids(inputs: Inputs) -> Tensor:
    assert inputs.cu_seqlens is not None
    lengths = inputs.cu_seqlens.diff().to(inputs.q.device)
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
    return numbers.repeat_interleave(lengths)[None]


def _to_jax(x: Tensor) -> Any:
    torch.cuda.synchronize()
    return _jax.dlpack.from_dlpack(x)
