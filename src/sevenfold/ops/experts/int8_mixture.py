"""A mixture of SwiGLU experts whose weights are held in int8, expert by expert."""

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype, check_shape
from sevenfold.ops.experts.dispatch import Dispatch, combine, gather_rows
from sevenfold.ops.low_precision import Int8Rows, int8_linear
from sevenfold.ops.swiglu import swiglu


def int8_mixture(
    x: Tensor, weights: Tensor, gate_up_proj: Int8Rows, down_proj: Int8Rows, dispatch: Dispatch
) -> Tensor:
    """Send each token through its experts, and sum what they make of it by weight.

        mixture(x, weights, codes * scale, codes * scale, dispatch)

    One expert at a time is dequantised, and none without tokens. Reads the counts on the host.

    Args:
        x: [T, D], bf16, fp16 or fp32.
        weights: [T, k], any floating dtype.
        gate_up_proj: codes [E, 2 F, D] and scale [E, 2 F], W_gate above W_up.
        down_proj: codes [E, D, F] and scale [E, D].
        dispatch: the plan of the tokens' choices.

    Returns:
        [T, D] in the dtype of x; a dropped choice adds nothing.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
    """
    E, F2, D = gate_up_proj.codes.shape
    check_shape("x", x, (len(x), D), "[T, D]")
    check_shape("weights", weights, dispatch.row.shape, "[T, k]")
    check_shape("down_proj.codes", down_proj.codes, (E, D, F2 // 2), "[E, D, F]")
    for name, rows in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        check_shape(f"{name}.scale", rows.scale, rows.codes.shape[:2], "[E, N]")
        check_dtype(f"{name}.codes", rows.codes, (torch.int8,))
    counts = dispatch.rows_per_expert.tolist()
    parts = [
        _expert(rows, Int8Rows(*(w[e] for w in gate_up_proj)), Int8Rows(*(w[e] for w in down_proj)))
        for e, rows in enumerate(gather_rows(x, dispatch).split(counts))
        if len(rows)
    ]
    rows = torch.cat(parts) if parts else x.new_zeros(0, D)
    return combine(rows, weights.to(rows.dtype), dispatch)


def _expert(x: Tensor, gate_up_proj: Int8Rows, down_proj: Int8Rows) -> Tensor:
    return int8_linear(swiglu(int8_linear(x, *gate_up_proj)), *down_proj)
