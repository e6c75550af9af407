"""OpenNLPLab's Lightning Attention-2 (https://pypi.org/p/lightning-attn)."""

from importlib import import_module

from torch import Tensor

from sevenfold.bench.kernels.cases import Case
from sevenfold.bench.kernels.inputs import Inputs
from sevenfold.bench.kernels.sides import Work
from sevenfold.bench.kernels.works import operator_work

_ops = import_module("lightning_attn.ops")


def build(case: Case, inputs: Inputs) -> Work:
    """Its operator on [B, H, T, D], which is how it takes its inputs."""
    slopes = -inputs.log_decay

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _ops.lightning_attn_func(q, k, v, slopes)

    return operator_work(case, inputs, operator, head_first=True)
