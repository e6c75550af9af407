"""The least time that a case can take on a machine: bytes over its copy rate.

A forward pass of width 128 does 96 to 144 FLOPs a byte at chunks of 64 to 256 tokens, fewer than
the 184 at which an H200's matrix units become the limit; a backward pass stays below it up to
chunks of 128. So memory sets the floor of every case here.
"""

from sevenfold.bench.kernels.cases import STATE_BYTES, Case, Task

_BF16_BYTES = 2
# Forward: q, k, v read, o written. Backward besides: q, k, v, do read, dq, dk, dv written.
_PASSES = {Task.FORWARD: 4, Task.BACKWARD: 11}


def floor_bytes(case: Case) -> int:
    """Return the bytes that any implementation must move.

        forward             4 tensors of B * T * H * D bf16
        forward + backward  11 of them
        decode, verify      the fp32 states of B * H sequences and heads, read and written once

    A verification's own tokens, and a decoding step's, are under 1% of that and not counted. Extra
    memory has no floor: none is needed.
    """
    if case.task in _PASSES:
        return _PASSES[case.task] * case.B * case.T * case.H * case.width * _BF16_BYTES
    if case.task is Task.MEMORY:
        return 0
    return 2 * case.B * case.H * STATE_BYTES


def floor_s(case: Case, copy_bytes_per_s: float) -> float | None:
    """Return the least time of a case in seconds; None for one that weighs memory."""
    if case.task is Task.MEMORY:
        return None
    return floor_bytes(case) / copy_bytes_per_s
