"""The error rule, and what tests and benchmarks of operators share. Not for product code."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


def error_bound(exact: Tensor, eager: Tensor) -> float:
    """Return the largest error that a kernel may have.

        2 * (max|eager - exact| + eps * max|exact|)

    Args:
        exact: the fp64 reference.
        eager: the same by eager PyTorch in the test's dtype, whose eps counts.

    Returns:
        The bound on max|kernel - exact|.

    Source: the rule of FlashAttention's tests; docs/numerics.md.
    """
    if exact.numel() == 0:
        return 0.0
    honest = (eager.double() - exact).abs().max()
    return float(2 * (honest + torch.finfo(eager.dtype).eps * exact.abs().max()))


def check_error(name: str, kernel: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Raise AssertionError unless a kernel's error keeps to error_bound."""
    assert kernel.shape == exact.shape, f"{name}: shape {kernel.shape}, not {exact.shape}"
    if exact.numel() == 0:
        return
    error = float((kernel.double() - exact).abs().max())
    bound = error_bound(exact, eager)
    assert error <= bound < float("inf"), f"{name}: error {error:.3e} exceeds {bound:.3e}"


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, so that reading it shows."""

    def poisoned(allocate):
        def call(*args, **options):
            x = allocate(*args, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return call

    with (
        mock.patch("torch.empty", poisoned(torch.empty)),
        mock.patch("torch.empty_like", poisoned(torch.empty_like)),
        mock.patch("torch.Tensor.new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        yield
