"""Who takes part: ours and the peers, each found by import alone, each with its own calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from sevenfold.bench.kernels.cases import SOFTMAX_MAX_TOKENS, Case, group_names
from sevenfold.config import ConfigError


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

    groups are those of the cases that it runs. module is what must be importable for it to be
    installed, package the distribution whose version counts, build ("file:function" in this
    package) takes (case, inputs) and returns its Work. softmax says that it computes softmax
    attention.
    """

    name: str
    module: str
    package: str
    build: str
    groups: tuple[str, ...]
    softmax: bool = False
    ours: bool = False

    def takes(self, case: Case) -> bool:
        """Whether this side runs a case."""
        too_long = self.softmax and case.T > SOFTMAX_MAX_TOKENS
        return bool({*self.groups} & {*case.groups}) and not too_long

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
        """Return its distribution's version; None where its files alone are on the path."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def all_sides() -> list[Side]:
    """Return every side in the order of the table, ours first."""
    return [*_ours(), *_fla(), *_others(), *_softmax(), *_slow_to_tune()]


def sides_of(names: Sequence[str]) -> list[Side]:
    """Return the sides of some names; all when none is given.

    Raises:
        ConfigError: a name is unknown.
    """
    known = {side.name: side for side in all_sides()}
    for name in names:
        if name not in known:
            raise ConfigError(f"sides must be of {', '.join(known)}, got {name}")
    return [side for side in known.values() if not names or side.name in names]


def side_named(name: str) -> Side:
    """Return one side by its name."""
    return {side.name: side for side in all_sides()}[name]


def _ours() -> list[Side]:
    ours = ("sevenfold.ops", "sevenfold")
    return [
        Side("sevenfold", *ours, "ours:build", tuple(group_names()), ours=True),
        Side("sevenfold ring", *ours, "ours:build_ring", ("decode",), ours=True),
    ]


def _fla() -> list[Side]:
    fla = ("fla.ops.simple_gla", "fla-core")
    whole = ("forward", "backward", "memory", "packed", "widths", "sweep")
    return [
        Side("fla chunk", *fla, "peer_fla:build_chunk", whole),
        Side("fla fused_recurrent", *fla, "peer_fla:build_recurrent", ("decode",)),
    ]


def _slow_to_tune() -> list[Side]:
    """Forms of fla that are slower than its chunk form, and tune themselves for a minute a pass."""
    fla = ("fla.ops.simple_gla", "fla-core")
    return [
        Side("fla chunk 128", *fla, "peer_fla:build_chunk_128", ("forward",)),
        Side("fla fused_chunk", *fla, "peer_fla:build_fused_chunk", ("forward",)),
    ]


def _others() -> list[Side]:
    jax = ("jax-linear-attention", "jla", "jax-linear-attention", "peer_jax:build")
    lightning = ("lightning-attn", "lightning_attn", "lightning-attn", "peer_lightning_attn:build")
    seg_la = "sglang.kernels.ops.attention.linear.seg_la"
    served = ("forward", "packed", "widths", "decode", "verify")
    return [
        Side(*jax, ("forward", "backward", "memory", "packed", "widths", "sweep")),
        Side(*lightning, ("forward", "backward", "widths")),
        Side("seg_la", seg_la, "sglang", "peer_sglang:build", served),
    ]


def _softmax() -> list[Side]:
    builds = {"softmax flash": "build_flash", "softmax cuDNN": "build_cudnn"}
    groups = ("forward", "backward", "widths", "sweep")
    return [
        Side(name, "torch", "torch", f"peer_softmax:{build}", groups, softmax=True)
        for name, build in builds.items()
    ]
