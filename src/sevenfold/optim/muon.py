"""Muon for matrices, with AdamW for everything else, as one optimizer."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sevenfold.optim.orthogonal import orthogonalized

_Matrix = TypeVar("_Matrix")

# Of matrices that are orthogonalised in one call: 256 MB in bf16.
_BATCH_ELEMENTS = 2**27


class Parts(NamedTuple):
    """How ranks hold a matrix, for those that hold it in part.

    whole: gathers what lies like a parameter; every rank calls it in the same order.
    own: this rank's part of a whole tensor, as it holds a parameter's.
    shape: of a whole parameter.
    """

    whole: Callable[[Tensor, nn.Parameter], Tensor]
    own: Callable[[Tensor, nn.Parameter], Tensor]
    shape: Callable[[nn.Parameter], Sequence[int]]


# Of a process that holds every matrix whole.
UNDIVIDED = Parts(lambda x, _: x, lambda x, _: x, lambda parameter: parameter.shape)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices; AdamW for the others.

        B = m B + (1 - m) G            U = (1 - m) G + m B        (Nesterov)
        W = W - lr (0.2 sqrt(max(M, N)) orthogonalized(U) + weight_decay W)

    The factor gives an update the root mean square of AdamW's, about 0.2, whatever the shape of the
    matrix [M, N]; so rate and decay are AdamW's. The leading dimension of stacked experts counts
    matrices. Matrices of one shape are orthogonalised together, in bf16 on a GPU, in their own
    dtype on a CPU.

    Args:
        groups: of matrices, as torch.optim takes them, with a weight_decay each.
        adamw: the optimizer of all other parameters, its groups and state part of this one's.
        momentum: m.
        parts: how ranks divide a matrix.

    Source: Jordan et al., 2024 (the method); arXiv 2502.16982 section 2.2 (factor, weight decay).
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        adamw: torch.optim.AdamW,
        *,
        momentum: float,
        parts: Parts = UNDIVIDED,
    ) -> None:
        # The dictionaries of adamw's groups are shared, so that one rate reaches both.
        super().__init__([*groups, *adamw.param_groups], {"lr": adamw.defaults["lr"]})
        self._matrices = self.param_groups[: len(groups)]
        self._adamw, self._momentum, self._parts = adamw, momentum, parts
        self.state = adamw.state
        for parameter in self._parameters():
            self.state[parameter] = {
                "momentum": torch.zeros_like(parameter, memory_format=torch.preserve_format)
            }

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self._matrices:
            yield from group["params"]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("closure must be None: a step is taken once, from gradients")
        for group in self._matrices:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for batch in batches(with_gradient, self._parts.shape):
                self._update(batch, group["lr"], group["weight_decay"])
        self._adamw.step()

    def _update(self, batch: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Parameters whose matrices have one shape."""
        moved = [self._parts.whole(self._nesterov(p), p) for p in batch]
        M, N = moved[0].shape[-2:]
        stacked = torch.cat([x.reshape(-1, M, N) for x in moved])
        whole = orthogonalized(stacked).split([x.numel() // (M * N) for x in moved])
        factor = 0.2 * max(M, N) ** 0.5
        for parameter, x, like in zip(batch, whole, moved, strict=True):
            update = self._parts.own(x.reshape(like.shape), parameter).to(parameter.dtype)
            parameter.mul_(1 - lr * weight_decay)
            parameter.sub_(update, alpha=lr * factor)

    def _nesterov(self, parameter: nn.Parameter) -> Tensor:
        gradient, momentum = parameter.grad, self.state[parameter]["momentum"]
        assert gradient is not None
        momentum.lerp_(gradient, 1 - self._momentum)
        moved = gradient.lerp(momentum, self._momentum)
        return moved.to(torch.bfloat16) if parameter.device.type == "cuda" else moved


def batches(
    matrices: Sequence[_Matrix], shape_of: Callable[[_Matrix], Sequence[int]]
) -> Iterator[list[_Matrix]]:
    """Those whose matrices have one shape, as many as may be orthogonalised at once."""
    by_shape: dict[tuple[int, ...], list[_Matrix]] = defaultdict(list)
    for matrix in matrices:
        by_shape[tuple(shape_of(matrix)[-2:])].append(matrix)
    for alike in by_shape.values():
        batch: list[_Matrix] = []
        for matrix in alike:
            if batch and sum(math.prod(shape_of(x)) for x in [*batch, matrix]) > _BATCH_ELEMENTS:
                yield batch
                batch = []
            batch.append(matrix)
        yield batch
