"""Half a layer of a few tokens on a CPU: the public operators and their conversion to arrays.

PyTorch spends more time in dispatch than in arithmetic on one token of a small model, and its
matrix-vector products reach half the memory bandwidth that a plain loop does. Here norm, products,
recurrence and residual of one half-layer are one call of compiled loops. Inference only.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from numpy import ndarray
from torch import Tensor

MAX_ROWS = 8  # more rows than these are faster as matrix products


class Norm(NamedTuple):
    """An RMSNorm: weight [D] and eps."""

    weight: Tensor
    eps: float


class Residual(NamedTuple):
    """y = alpha * stream + beta * f; the stream is the norm's output (post-norm) or its input."""

    alpha: float
    beta: float
    post_norm: bool


class LightningWeights(NamedTuple):
    """Of a lightning-attention layer.

    qkv [3 H D, hidden_size], head by head; gate [H D, hidden_size]; norm over H D;
    out [hidden_size, H D]; log_decay [H].
    """

    qkv: Tensor
    gate: Tensor
    norm: Norm
    out: Tensor
    log_decay: Tensor


def suits_few_rows(x: Tensor) -> bool:
    """Whether x [..., D] has at most MAX_ROWS rows, fp32 or fp64 on a CPU, and needs no gradient.

    Not under autocast, which works on PyTorch's own operators.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and 0 < x.numel() <= MAX_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def lightning_rows(
    x: Tensor, norm: Norm, weights: LightningWeights, residual: Residual, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token a sequence through norm, lightning attention and residual.

        u = RMSNorm(x)      q, k, v = silu(W_qkv u)      S = decay * state + k v^T
        y = alpha * (u or x) + beta * W_out (RMSNorm(q^T S) * sigmoid(W_gate u))

    Args:
        x: [N, D] fp32 or fp64 on the CPU, N at most MAX_ROWS.
        norm: of the input.
        weights: of the layer, dtype of x.
        residual: how the result joins the stream.
        state: [N, H, K, V], dtype of x; it is not changed.

    Returns:
        y [N, D] and the new state.
    """
    y, after = torch.empty_like(x), torch.empty_like(state)
    arrays = (_array(weights.qkv), _array(weights.gate), _array(weights.out))
    decay = _array(weights.log_decay.to(x.dtype).exp())
    _kernels().lightning(
        _array(x),
        (_array(norm.weight), norm.eps),
        (*arrays, _array(weights.norm.weight), weights.norm.eps, decay),
        residual,
        _array(state),
        after.numpy(),
        y.numpy(),
    )
    return y, after


def expert_rows(
    x: Tensor,
    norm: Norm,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Residual,
    *,
    num_chosen: int,
) -> Tensor:
    """A few tokens through norm, their experts and residual.

        u = RMSNorm(x)      p = softmax(W_r u), the num_chosen largest scaled to sum to 1
        y = alpha * (u or x) + beta * sum_i p_i W_down,i (silu(W_gate,i u) * W_up,i u)

    Args:
        x: [N, D] fp32 or fp64 on the CPU, N at most MAX_ROWS.
        norm: of the input.
        router: [E, D], dtype of x.
        gate_up: [E, 2 F, D], dtype of x.
        down: [E, D, F], dtype of x.
        residual: how the result joins the stream.
        num_chosen: 1 to E.

    Returns:
        [N, D].
    """
    y = torch.empty_like(x)
    arrays = (_array(router), _array(gate_up), _array(down))
    norm_arrays = (_array(norm.weight), norm.eps)
    _kernels().experts(_array(x), norm_arrays, arrays, num_chosen, residual, y.numpy())
    return y


def dense_rows(x: Tensor, norm: Norm, gate_up: Tensor, down: Tensor, residual: Residual) -> Tensor:
    """A few tokens through norm, SwiGLU and residual.

        u = RMSNorm(x)      y = alpha * (u or x) + beta * W_down (silu(W_gate u) * W_up u)

    Args:
        x: [N, D] fp32 or fp64 on the CPU, N at most MAX_ROWS.
        norm: of the input.
        gate_up: [2 F, D], dtype of x.
        down: [D, F], dtype of x.
        residual: how the result joins the stream.

    Returns:
        [N, D].
    """
    y = torch.empty_like(x)
    arrays = (_array(gate_up.unsqueeze(0)), _array(down.unsqueeze(0)))
    _kernels().dense(_array(x), (_array(norm.weight), norm.eps), arrays, residual, y.numpy())
    return y


def _array(x: Tensor) -> ndarray:
    return x.detach().contiguous().numpy()


def _kernels() -> ModuleType:
    # numba takes half a second to import: only who decodes on a CPU waits for it.
    from sevenfold.ops.compiled import use_torch_threads
    from sevenfold.ops.few_rows import kernels

    use_torch_threads()
    return kernels
