"""Which token goes to which expert's rows, and the way back: the public operators."""

from dataclasses import dataclass

from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.checks import choose_impl
from sevenfold.ops.experts import dispatch_eager
from sevenfold.ops.triton_rules import check_on_gpu, runs_on_gpu
from sevenfold.ops.types import Impl

_KNOWN = (Impl.EAGER, Impl.TRITON)


@dataclass(frozen=True)
class Dispatch:
    """The rows of all experts, sorted by expert; T tokens with k choices each, R rows.

    choice [R]: the choice t k + j that each row comes from.
    row [T, k]: where each choice stands among the rows, R for a choice that was dropped.
    rows_per_expert [E]: int32. They sum to R, or to less on a GPU, where R is the most that a
        capacity lets through and no count is read: the rows beyond the sum belong to nobody.
    is_full: whether the host knows that every row is a choice's.
    """

    choice: Tensor
    row: Tensor
    rows_per_expert: Tensor
    is_full: bool = False

    @property
    def token(self) -> Tensor:
        """[R]: the token that each row comes from."""
        return self.choice // self.row.shape[1]


def default_dispatch_impl(x: Tensor) -> Impl:
    """Return what gather_rows and combine take: triton for bf16, fp16, fp32 on a GPU."""
    return Impl.TRITON if runs_on_gpu(x) else Impl.EAGER


def plan_dispatch(
    experts: Tensor, num_experts: int, capacity: int | None, *, impl: Impl | str | None = None
) -> Dispatch:
    """Sort the tokens' choices by expert, and drop what exceeds the capacity.

    Choices keep the order of the tokens within an expert, so a choice is dropped because of earlier
    tokens only.

    Args:
        experts: [T, k] int64, the experts that each token chose, 0 to E - 1.
        num_experts: E.
        capacity: rows that one expert takes at most; None drops nothing.
        impl: "eager" or "triton" (a GPU; it waits for nothing and can be captured); None takes
            triton on a GPU. A named one never falls back.

    Returns:
        The plan.

    Raises:
        UnsupportedError: triton is asked for on another device, or there is no implementation of
            that name.

    Source: token drop as in arXiv 2006.16668 (GShard).
    """
    on_gpu = experts.device.type == "cuda"
    default = Impl.TRITON if on_gpu else Impl.EAGER
    if choose_impl("plan_dispatch", impl, default, _KNOWN) is Impl.EAGER:
        return Dispatch(*dispatch_eager.plan(experts, num_experts, capacity), is_full=True)
    if not on_gpu:
        raise UnsupportedError(f"experts must lie on a GPU for impl triton, got {experts.device}")
    from sevenfold.ops.experts import triton_dispatch

    plan = triton_dispatch.plan_dispatch(experts, num_experts, capacity)
    return Dispatch(*plan, is_full=capacity is None)


def gather_rows(x: Tensor, dispatch: Dispatch, *, impl: Impl | str | None = None) -> Tensor:
    """Copy each token to the rows of its experts.

    Args:
        x: [T, D].
        dispatch: the plan.
        impl: "eager" or "triton" (reads each token once); None takes default_dispatch_impl.

    Returns:
        [R, D]; rows that belong to nobody are zero.

    Raises:
        UnsupportedError: triton is asked for on another device or dtype, or there is no
            implementation of that name.
    """
    if choose_impl("gather_rows", impl, default_dispatch_impl(x), _KNOWN) is Impl.EAGER:
        return dispatch_eager.gather_rows(x, dispatch.token, dispatch.row)
    check_on_gpu("x", x)
    from sevenfold.ops.experts import triton_rows

    return triton_rows.gather_rows(x, dispatch.row, len(dispatch.choice), dispatch.is_full)


def combine(
    rows: Tensor, weights: Tensor, dispatch: Dispatch, *, impl: Impl | str | None = None
) -> Tensor:
    """Sum each token's rows by weight; a dropped choice adds nothing.

        y_t = sum over choices j of weights_tj * rows[row_tj]

    Args:
        rows: [R, D].
        weights: [T, k] in the dtype of rows.
        dispatch: the plan.
        impl: "eager" or "triton" (sums in fp32); None takes default_dispatch_impl.

    Returns:
        [T, D] in the dtype of rows.

    Raises:
        UnsupportedError: triton is asked for on another device or dtype, or there is no
            implementation of that name.
    """
    if choose_impl("combine", impl, default_dispatch_impl(rows), _KNOWN) is Impl.EAGER:
        return dispatch_eager.combine(rows, weights, dispatch.token, dispatch.row)
    check_on_gpu("rows", rows)
    from sevenfold.ops.experts import triton_rows

    return triton_rows.combine(rows, weights, dispatch.row)
