"""Who takes part: ours and the peers, each found by import alone, each with its own calls."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from sevenfold.bench.kernels.cases import SOFTMAX_MAX_TOKENS, Case, Task

_OPERATOR = (Task.FORWARD, Task.BACKWARD)
_DECODING = (Task.DECODE, Task.VERIFY)


@dataclass(frozen=True)
class Work:
    """One case made ready for one side.

    check runs it once and returns its outputs by name, token-major: o, and dq, dk, dv with a
    backward; of decoding, o [steps, B, H, 128]. run is what is timed and does the work calls times;
    wait is given where torch's events do not see the work. extra_bytes weighs it, where asked.
    """

    check: Callable[[], Mapping[str, Tensor]]
    run: Callable[[], Any]
    calls: int = 1
    wait: Callable[[Any], Any] | None = None
    extra_bytes: Callable[[], int] | None = None


@dataclass(frozen=True)
class Side:
    """One implementation.

    tasks are those it has, packed whether it takes packed documents, sweep whether it is in the
    figure over the length, softmax whether it computes softmax attention. module is what must be
    importable for it to be installed, package the distribution whose version counts, build
    ("file:function" in this package) takes (case, inputs) and returns its Work.
    """

    name: str
    module: str
    package: str | None
    build: str
    tasks: tuple[Task, ...]
    packed: bool = False
    sweep: bool = False
    softmax: bool = False
    ours: bool = False

    def takes(self, case: Case) -> bool:
        """Whether this side has the operator of a case, and is to run it."""
        if self.softmax and case.T > SOFTMAX_MAX_TOKENS:
            return False
        if case.group == "sweep" and not self.sweep:
            return False
        return case.task in self.tasks and (self.packed or case.lengths is None)

    def is_installed(self) -> bool:
        """Whether its module can be imported; nothing is loaded but the packages above it."""
        try:
            return find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False

    def builder(self) -> Callable[[Case, Any], Work]:
        """Import the file of its calls, and so the peer."""
        file, function = self.build.split(":")
        return getattr(import_module(f"sevenfold.bench.kernels.{file}"), function)

    def version(self) -> str | None:
        """Return its distribution's version; None for a side that has none or is not installed."""
        try:
            return None if self.package is None else version(self.package)
        except PackageNotFoundError:
            return None


def all_sides() -> list[Side]:
    """Return every side, ours first, in the order of the table."""
    return [*_ours(), *_fla(), *_others(), *_softmax()]


def side_named(name: str) -> Side:
    """Return one side by its name."""
    return {side.name: side for side in all_sides()}[name]


def _ours() -> list[Side]:
    ours = ("sevenfold.ops", "sevenfold")
    operator = (*_OPERATOR, Task.MEMORY, *_DECODING)
    return [
        Side("sevenfold", *ours, "ours:build", operator, packed=True, sweep=True, ours=True),
        Side("sevenfold ring", *ours, "ours:build_ring", (Task.DECODE,), ours=True),
    ]


def _fla() -> list[Side]:
    fla = ("fla.ops.simple_gla", "fla-core")
    operator = (*_OPERATOR, Task.MEMORY)
    # These two are slower than the first, and tune themselves for a minute for each pass.
    forward = (Task.FORWARD,)
    return [
        Side("fla chunk", *fla, "peer_fla:build_chunk", operator, packed=True, sweep=True),
        Side("fla chunk 128", *fla, "peer_fla:build_chunk_128", forward, packed=True),
        Side("fla fused_chunk", *fla, "peer_fla:build_fused_chunk", forward, packed=True),
        Side("fla fused_recurrent", *fla, "peer_fla:build_recurrent", (Task.DECODE,)),
    ]


def _others() -> list[Side]:
    lightning = ("lightning_attn", "lightning-attn")
    seg_la = "sglang.kernels.ops.attention.linear.seg_la"
    return [
        Side(
            "jax-linear-attention",
            "jla",
            "jax-linear-attention",
            "peer_jax:build",
            (*_OPERATOR, Task.MEMORY),
            packed=True,
            sweep=True,
        ),
        Side("lightning-attn", *lightning, "peer_lightning_attn:build", _OPERATOR),
        Side(
            "seg_la", seg_la, "sglang", "peer_sglang:build", (Task.FORWARD, *_DECODING), packed=True
        ),
    ]


def _softmax() -> list[Side]:
    torch = ("torch", "torch")
    return [
        Side(
            "softmax flash", *torch, "peer_softmax:build_flash", _OPERATOR, sweep=True, softmax=True
        ),
        Side(
            "softmax cuDNN", *torch, "peer_softmax:build_cudnn", _OPERATOR, sweep=True, softmax=True
        ),
    ]
