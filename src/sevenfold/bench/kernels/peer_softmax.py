"""Causal softmax attention by PyTorch: what linear attention stands in for."""

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sevenfold.bench.kernels.cases import Case
from sevenfold.bench.kernels.inputs import Inputs
from sevenfold.bench.kernels.sides import Work
from sevenfold.bench.kernels.works import operator_work


def build_flash(case: Case, inputs: Inputs) -> Work:
    """FlashAttention-2, as PyTorch ships it."""
    return _build(case, inputs, SDPBackend.FLASH_ATTENTION)


def build_cudnn(case: Case, inputs: Inputs) -> Work:
    """cuDNN's attention."""
    return _build(case, inputs, SDPBackend.CUDNN_ATTENTION)


def _build(case: Case, inputs: Inputs, backend: SDPBackend) -> Work:
    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return operator_work(case, inputs, operator, head_first=True)
