"""What the decoding kernels share: powers of the decay, and where they run."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sevenfold.config import UnsupportedError
from sevenfold.ops.row_launch import next_power_of_2
from sevenfold.ops.tuning import best_config

WIDEST = 256  # widest head that the kernels were built for
FEW_HEADS = 512  # B * H up to which it is a launch's latency that counts


@triton.jit
def power(log_decay, distance):
    """decay^distance for distance >= 0, correctly rounded where the decay is close to 1.

    A slow head multiplies its state by this some 1e4 times, and the hardware's exponential is off
    by up to 2^-22 each time, always in the same direction; near zero a polynomial is not.
    """
    x = log_decay * distance
    near = 1 + x * (1 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24))))
    return tl.where(x > -0.03, near, tl.exp(x))


@triton.jit
def load_log_decay(log_decay, h):
    """One head's log decay, finite, so that an infinite one times no distance is 1 and not NaN."""
    return tl.maximum(tl.load(log_decay + h), -3.4e38)


@triton.jit
def weigh(keys, P, rate, BR: tl.constexpr):
    """P pending keys [BK, BR], each as it counts in the state after the last: decay^(P - 1 - i)."""
    i = tl.arange(0, BR)
    left = tl.where(i < P, power(rate, tl.where(i < P, P - 1 - i, 0).to(tl.float32)), 0.0)
    return keys.to(tl.float32) * left[None, :]


@triton.jit
def fold(S, decay, weighted, values):
    """The state [BK, BV] with weighted keys [BK, BR] and values [BR, BV] added to it.

    A weighted key has 24 bits and a tensor core takes 11, so the product is split in three; a value
    of 16 bits is exact.
    """
    precision: tl.constexpr = "ieee" if values.dtype == tl.float32 else "tf32x3"
    return decay * S + tl.dot(weighted, values.to(tl.float32), input_precision=precision)


def check_runnable(kernel: object, q: torch.Tensor, V: int) -> None:
    """Raise UnsupportedError unless the kernel can run on q and values of width V.

    Triton's interpreter, which stands in for the compiled kernel in tests, runs on a CPU too.
    """
    if q.device.type != "cuda" and isinstance(kernel, triton.JITFunction):
        raise UnsupportedError(f"impl 'triton' must run on a CUDA device, got {q.device}")
    if q.dtype == torch.float64:
        raise UnsupportedError("impl 'triton' must run in bf16, fp16 or fp32, got torch.float64")
    if max(q.shape[-1], V) > WIDEST:
        raise UnsupportedError(
            f"impl 'triton' must have heads of at most {WIDEST}, got {max(q.shape[-1], V)}"
        )


def pool_arguments(
    pool: Sequence[torch.Tensor],
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...]]:
    """Return what a kernel takes of a ReplayPool or Int8ReplayPool, and the strides of its slots.

    The state (or codes), ring_k, ring_v, count, and the scales of codes or None.
    """
    held = (*pool, None)[:5]
    return held, tuple(0 if x is None else x.stride(0) for x in held)


def contiguous_widths(x: torch.Tensor) -> torch.Tensor:
    """Return x with its last axis laid out without gaps, which the kernels read by vectors."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tuning(kernel: str, heads: int, K: int, device: torch.device) -> dict[str, int]:
    """Return a launch configuration for a number of heads, B * H, of key width K.

    Two rows a width: one program a head leaves multiprocessors idle, or fills them.
    """
    key = f"K{max(16, next_power_of_2(K))} {'few' if heads <= FEW_HEADS else 'many'} heads"
    # The interpreter takes the defaults on purpose, without the warning of an unknown GPU.
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "default"
    return best_config(kernel, key, name)
