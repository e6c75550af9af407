"""What tokens add to a state at a border of theirs, and what they read of one.

A row that several ranks hold has borders inside its documents. Of a span of tokens next to one

    added    S = sum_i decay^d_i a_i b_i^T
    read     y_i = y_i + decay^d_i x_i^T S

where d_i counts from the border: 0, 1, ... backwards from a span's end, and 1, 2, ... onwards from
its start. Fast heads reach a few tokens, so little of a long span is read. Neither takes a
gradient: the gradients of one are the other, with the operands in other roles.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.lightning import borders_eager
from sevenfold.ops.precision import full_precision
from sevenfold.ops.triton_rules import check_on_gpu, check_width, runs_on_gpu
from sevenfold.ops.types import Impl

_IMPLS = (Impl.EAGER, Impl.TRITON)
_MAX_WIDTH = 256


class Span(NamedTuple):
    """Tokens next to a border: the first, and how many; none where nothing crosses."""

    start: int
    length: int


def lightning_added(
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    spans: Sequence[Span],
    *,
    from_end: bool,
    impl: Impl | str | None = None,
) -> Tensor:
    """Return the state that each span's tokens add at its border.

        S_n = sum_i decay^d_i a_i b_i^T

    Args:
        a: [T, H, K], bf16, fp16, fp32 or fp64. Its products with the weighed b have its dtype, as
            in the recurrence's kernels; sums are fp32 at least.
        b: [T, H, V], dtype of a.
        log_decay: [H] fp32, finite and <= 0.
        spans: of the T tokens.
        from_end: whether the border is at the spans' ends, or at their starts.
        impl: "eager" or "triton" (bf16, fp16 or fp32 on a GPU, widths up to 256); None takes
            triton where it serves. A named one never falls back.

    Returns:
        [N, H, K, V] in fp32 (fp64 for fp64); zeros for a span without tokens.

    Raises:
        ValueError, TypeError: a shape, dtype, device or span breaks the rules above.
        UnsupportedError: the implementation cannot serve the arguments.
    """
    _check("b", a, b, log_decay, spans)
    with torch.no_grad(), full_precision(a.device):
        if _chosen(impl, a, b) is Impl.TRITON:
            return _added_on_gpu(a, b, log_decay, _numbers(spans), from_end)
        return borders_eager.added(a, b, log_decay, spans, from_end)


def lightning_add_read(
    y: Tensor,
    x: Tensor,
    states: Tensor,
    log_decay: Tensor,
    spans: Sequence[Span],
    *,
    from_end: bool,
    impl: Impl | str | None = None,
) -> None:
    """Add to y, in place, what each span's tokens read of the state at its border.

        y_i = y_i + decay^d_i x_i^T S_n

    Args:
        y: [T, H, V], dtype of x, with values side by side: a last stride of 1.
        x: [T, H, K].
        states: [N, H, K, V] fp32 (fp64 for fp64); rounded to x's dtype for the product.
        log_decay, spans, from_end, impl: as in lightning_added; spans do not overlap.

    Raises:
        ValueError, TypeError, UnsupportedError: as lightning_added.
    """
    _check("y", x, y, log_decay, spans)
    if y.stride(2) != 1:
        raise ValueError(f"y's last stride must be 1, got {y.stride(2)}")
    check_shape("states", states, (len(spans), *x.shape[1:], y.shape[2]), "[N, H, K, V]")
    check_dtype("states", states, (torch.promote_types(x.dtype, torch.float32),))
    with torch.no_grad(), full_precision(x.device):
        if _chosen(impl, x, y) is Impl.TRITON:
            _add_read_on_gpu(y, x, states, log_decay, _numbers(spans), from_end)
        else:
            borders_eager.add_read(y, x, states, log_decay, spans, from_end)


def _chosen(impl: Impl | str | None, x: Tensor, y: Tensor) -> Impl:
    widths = (("K", x.shape[2]), ("V", y.shape[2]))
    serves = runs_on_gpu(x) and all(width <= _MAX_WIDTH for _, width in widths)
    default = Impl.TRITON if serves else Impl.EAGER
    chosen = choose_impl("the operators at borders", impl, default, _IMPLS)
    if chosen is Impl.TRITON:
        check_on_gpu("tokens", x)
        for name, width in widths:
            check_width(name, width, _MAX_WIDTH)
    return chosen


# Triton takes a while to import: only who needs it waits for it. Spans come as plain numbers.
@torch.library.custom_op("sevenfold::lightning_added", mutates_args=())
def _added_on_gpu(
    a: Tensor, b: Tensor, log_decay: Tensor, spans: list[int], from_end: bool
) -> Tensor:
    from sevenfold.ops.lightning import triton_borders

    return triton_borders.added(a, b, log_decay, _pairs(spans), from_end)


@_added_on_gpu.register_fake
def _(a, b, log_decay, spans, from_end):
    shape = (len(spans) // 2, *a.shape[1:], b.shape[2])
    return a.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("sevenfold::lightning_add_read", mutates_args=("y",))
def _add_read_on_gpu(
    y: Tensor, x: Tensor, states: Tensor, log_decay: Tensor, spans: list[int], from_end: bool
) -> None:
    from sevenfold.ops.lightning import triton_borders

    triton_borders.add_read(y, x, states, log_decay, _pairs(spans), from_end)


@_add_read_on_gpu.register_fake
def _(y, x, states, log_decay, spans, from_end):
    return None


def _numbers(spans: Sequence[Span]) -> list[int]:
    return [number for span in spans for number in span]


def _pairs(spans: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(spans[::2], spans[1::2], strict=True))


def _check(name: str, x: Tensor, y: Tensor, log_decay: Tensor, spans: Sequence[Span]) -> None:
    T, H, _ = x.shape
    check_shape(name, y, (T, H, y.shape[-1]), "[T, H, D]")
    check_dtype(name, y, (x.dtype,))
    check_shape("log_decay", log_decay, (H,), "[H]")
    for which, tensor in ((name, y), ("log_decay", log_decay)):
        check_device(which, tensor, x.device)
    for span in spans:
        if span.length < 0 or not 0 <= span.start <= T - span.length:
            raise ValueError(f"spans must lie in the {T} tokens, got {tuple(span)}")
