"""One case of one side: draw, build, compare with fp64, time."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sevenfold.bench.kernels.cases import Case, Task
from sevenfold.bench.kernels.exact import (
    MAX_RELATIVE_ERROR,
    Expected,
    expect_decode,
    expect_lightning,
    expect_softmax,
)
from sevenfold.bench.kernels.inputs import case_inputs, decode_inputs
from sevenfold.bench.kernels.sides import Side, Work, side_named
from sevenfold.bench.kernels.timing import ceilings, queued_median_s, time_run, timed_once
from sevenfold.config import UnsupportedError

# Softmax with more FLOPs, half a second and more, is timed by the one run that is checked.
_SLOW_FLOPS = 2e14

_DECODING = (Task.DECODE, Task.VERIFY)

Result = dict[str, Any]


def open_side(name: str) -> Callable[[Case], Result]:
    """Import a side in this process; the function that measures its cases on the GPU."""
    side = side_named(name)
    return partial(measure, side, side.builder(), torch.device("cuda"))


def open_ceilings() -> Callable[[None], Result]:
    """Return what measures the GPU itself."""
    return _measure_ceilings


def _measure_ceilings(_item: None) -> Result:
    found = ceilings(torch.device("cuda"))
    _release(torch.device("cuda"))
    return dict(found)


def measure(
    side: Side, build: Callable[[Case, Any], Work], device: torch.device, case: Case
) -> Result:
    """Check a case against fp64 and time it.

    Returns:
        status "ok", "wrong" (it is timed all the same) or "unsupported" with a note; error, the
        largest relative one of all outputs; error_rule, ours alone, the share of the error rule's
        bound that is used up; median_s, runs, calls in a run; host_s, what a call costs the host
        before the device has its work, where that is seen; extra_bytes where memory is weighed.
    """
    draw = decode_inputs if case.task in _DECODING else case_inputs
    inputs = draw(case, device)
    try:
        work = build(case, inputs)
    except UnsupportedError as error:
        return {"status": "unsupported", "note": str(error)}
    once_s, outputs = timed_once(work.check, device)
    expected = _expected(side, case, inputs)
    result = _verdict(side, expected, outputs)
    del outputs, expected
    _release(device)
    if work.extra_bytes is not None:
        result["extra_bytes"] = work.extra_bytes()
    if _is_slow(side, case):
        result |= {"median_s": once_s, "runs": 1, "calls": 1, "host_s": None}
    elif case.task is not Task.MEMORY:
        result |= _timed(work, device)
    del work, inputs
    _release(device)
    return result


def _is_slow(side: Side, case: Case) -> bool:
    """Whether the triangle of q k^T and of its product with v is large."""
    return side.softmax and 2 * case.B * case.H * case.T**2 * case.width > _SLOW_FLOPS


def _expected(side: Side, case: Case, inputs: Any) -> Expected:
    if side.softmax:
        return expect_softmax(case, inputs)
    if case.task in _DECODING:
        return expect_decode(case, inputs, with_eager=side.ours)
    return expect_lightning(case, inputs, with_eager=side.ours)


def _verdict(side: Side, expected: Expected, outputs: Any) -> Result:
    error, share = expected.relative_error(outputs), expected.share_of_bound(outputs)
    # Not a number compares false.
    right = share <= 1 if share is not None else error <= MAX_RELATIVE_ERROR
    return {
        "status": "ok" if right else "wrong",
        "error": error if error < float("inf") else None,
        "error_rule": share if share is not None and share < float("inf") else None,
    }


def _timed(work: Work, device: torch.device) -> Result:
    if work.wait is None:
        took, runs, host_s = time_run(work.run, device)
    else:
        took, runs = queued_median_s(work.run, work.wait)
        host_s = None
    host_s = None if host_s is None else host_s / work.calls
    return {"median_s": took / work.calls, "runs": runs, "calls": work.calls, "host_s": host_s}


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
