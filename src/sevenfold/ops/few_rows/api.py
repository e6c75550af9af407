"""Half a layer of a few tokens on a CPU: the public operators and their conversion to arrays.

PyTorch spends more time in dispatch than in arithmetic on one token of a small model, and its
matrix-vector products reach half the memory bandwidth that a plain loop does. Here norm, products,
recurrence and residual of one half-layer are one call of compiled loops. Inference only.
"""

from types import ModuleType

import torch
from numpy import ndarray
from torch import Tensor

from sevenfold.ops.few_rows.types import LightningWeights, Norm, Residual

MAX_ROWS = 8  # more rows than these are faster as matrix products


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


class LightningRows:
    """One token a sequence through norm, lightning attention and residual.

        u = RMSNorm(x)      q, k, v = silu(W_qkv u)      S = decay * state + k v^T
        y = alpha * (u or x) + beta * W_out (RMSNorm(q^T S) * sigmoid(W_gate u))

    It reads the weights where they lie: a change in place counts, a tensor put in their place does
    not.
    """

    def __init__(self, norm: Norm, weights: LightningWeights, residual: Residual) -> None:
        """Prepare a layer.

        Args:
            norm: of the input.
            weights: of the layer, contiguous, fp32 or fp64 on the CPU.
            residual: how the result joins the stream.

        Raises:
            ValueError: a weight is not contiguous.
        """
        decay = weights.log_decay.to(weights.qkv.dtype).exp()
        arrays = tuple(map(_array, (weights.qkv, weights.gate, weights.out, weights.norm.weight)))
        self._norm = (_array(norm.weight), norm.eps)
        self._weights = (*arrays, weights.norm.eps, _array(decay))
        self._residual = tuple(residual)

    def __call__(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one token.

        Args:
            x: [N, D], dtype of the weights, N at most MAX_ROWS.
            state: [N, H, K, V], dtype of x; it is not changed.

        Returns:
            y [N, D] and the new state.
        """
        after = torch.empty_like(state)
        return self._run(x, state, after), after

    def advance(self, x: Tensor, state: Tensor) -> Tensor:
        """Run one token as a call does, and leave the new state [N, H, K, V] in place of the old.

        Args:
            x: [N, D].
            state: contiguous.

        Returns:
            y [N, D].
        """
        return self._run(x, state, state)

    def _run(self, x: Tensor, state: Tensor, after: Tensor) -> Tensor:
        y = torch.empty_like(x)
        arrays = (state.numpy(), after.numpy(), y.numpy())
        _kernels().lightning(x.numpy(), self._norm, self._weights, self._residual, *arrays)
        return y


class ExpertRows:
    """A few tokens through norm, their experts and residual.

        u = RMSNorm(x)      p = softmax(W_r u), the num_chosen largest scaled to sum to 1
        y = alpha * (u or x) + beta * sum_i p_i W_down,i (silu(W_gate,i u) * W_up,i u)

    It reads the weights as LightningRows does.
    """

    def __init__(
        self,
        norm: Norm,
        router: Tensor,
        gate_up: Tensor,
        down: Tensor,
        residual: Residual,
        *,
        num_chosen: int,
    ) -> None:
        """Prepare a layer.

        Args:
            norm: of the input.
            router: [E, D], fp32 or fp64 on the CPU, contiguous, as all weights.
            gate_up: [E, 2 F, D].
            down: [E, D, F].
            residual: how the result joins the stream.
            num_chosen: 1 to E.

        Raises:
            ValueError: a weight is not contiguous.
        """
        self._norm = (_array(norm.weight), norm.eps)
        self._weights = tuple(map(_array, (router, gate_up, down)))
        self._residual, self._num_chosen = tuple(residual), num_chosen

    def __call__(self, x: Tensor) -> Tensor:
        """Run x [N, D], dtype of the weights, N at most MAX_ROWS: [N, D]."""
        y = torch.empty_like(x)
        run = _kernels().experts
        run(x.numpy(), self._norm, self._weights, self._num_chosen, self._residual, y.numpy())
        return y


class DenseRows:
    """A few tokens through norm, SwiGLU and residual.

        u = RMSNorm(x)      y = alpha * (u or x) + beta * W_down (silu(W_gate u) * W_up u)

    It reads the weights as LightningRows does.
    """

    def __init__(self, norm: Norm, gate_up: Tensor, down: Tensor, residual: Residual) -> None:
        """Prepare a layer.

        Args:
            norm: of the input.
            gate_up: [2 F, D], fp32 or fp64 on the CPU, contiguous, as all weights.
            down: [D, F].
            residual: how the result joins the stream.

        Raises:
            ValueError: a weight is not contiguous.
        """
        self._norm = (_array(norm.weight), norm.eps)
        self._weights = (_array(gate_up.unsqueeze(0)), _array(down.unsqueeze(0)))
        self._residual = tuple(residual)

    def __call__(self, x: Tensor) -> Tensor:
        """Run x [N, D], dtype of the weights, N at most MAX_ROWS: [N, D]."""
        y = torch.empty_like(x)
        _kernels().dense(x.numpy(), self._norm, self._weights, self._residual, y.numpy())
        return y


def _array(x: Tensor) -> ndarray:
    if not x.is_contiguous():
        raise ValueError(f"weights must be contiguous, got strides {list(x.stride())}")
    return x.detach().numpy()


def _kernels() -> ModuleType:
    # numba takes half a second to import: only who decodes on a CPU waits for it.
    from sevenfold.ops.compiled import use_torch_threads
    from sevenfold.ops.few_rows import kernels

    use_torch_threads()
    return kernels
