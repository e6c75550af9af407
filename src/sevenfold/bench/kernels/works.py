"""How most sides do a case: a function of q, k, v, its gradient, its memory, its captured steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sevenfold.bench.kernels.cases import Case, Task
from sevenfold.bench.kernels.inputs import DecodeInputs, Inputs
from sevenfold.bench.kernels.sides import Work

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]
Tensors = tuple[Tensor, ...]


def operator_work(
    case: Case, inputs: Inputs, operator: Operator, *, head_first: bool = False
) -> Work:
    """Build the work of an operator over whole sequences.

    Args:
        case, inputs: what to run.
        operator: o of q, k and v.
        head_first: operator takes and returns [B, H, T, D] in one piece; the inputs are laid out so
            beforehand, outside of what is timed.
    """
    lay = _head_first if head_first else _as_it_is
    q, k, v = (lay(x) for x in (inputs.q, inputs.k, inputs.v))
    if case.task is Task.FORWARD:
        forward = torch.no_grad()(lambda: operator(q, k, v))
        return Work(lambda: {"o": _token_major(forward(), head_first)}, forward)
    assert inputs.do is not None
    do = lay(inputs.do)

    def run() -> Tensors:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            o = operator(*leaves)
        return (o.detach(), *torch.autograd.grad(o, leaves, do))

    def check() -> Mapping[str, Tensor]:
        found = (_token_major(x, head_first) for x in run())
        return dict(zip(("o", "dq", "dk", "dv"), found, strict=True))

    weigh = (lambda: peak_over_results(run)) if case.task is Task.MEMORY else None
    return Work(check, run, extra_bytes=weigh)


def peak_over_results(run: Callable[[], Tensors]) -> int:
    """Return the bytes that a call allocates at its peak beyond what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return peak - sum(x.nbytes for x in results)


def steps_work(
    inputs: DecodeInputs,
    check: Callable[[], Tensor],
    step: Callable[[int], object],
    rounds: int = 1,
    draft_bytes: int | None = None,
) -> Work:
    """Build the work of decoding steps, captured in a CUDA graph so that no host time counts.

    Args:
        inputs: what to run.
        check: computes o of all of inputs' tokens, from a fresh pool.
        step: does one step over the slots of a turn, whose number it takes.
        rounds: steps that each turn takes in one run.
        draft_bytes: of memory that a verification needs for its draft.
    """
    turns = [turn for _ in range(rounds) for turn in range(inputs.turns)]

    def run() -> None:
        for turn in turns:
            step(turn)

    timed = capture(run) if inputs.q.device.type == "cuda" else run
    weigh = None if draft_bytes is None else lambda: draft_bytes
    return Work(lambda: {"o": check()}, timed, calls=len(turns), extra_bytes=weigh)


@dataclass(frozen=True)
class Replay:
    """A captured graph, with the function whose tensors it reads and writes: they must live on."""

    graph: torch.cuda.CUDAGraph
    captured: Callable[[], object]

    def __call__(self) -> None:
        """Run what was captured."""
        self.graph.replay()


def capture(run: Callable[[], object]) -> Replay:
    """Run a function once, then capture it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        run()
    return Replay(graph, run)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _head_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _token_major(x: Tensor, head_first: bool) -> Tensor:
    return x.transpose(1, 2) if head_first else x
