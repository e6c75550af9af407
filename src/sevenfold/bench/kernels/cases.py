"""What the kernel benchmark runs: shapes, slopes, packing, targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sevenfold.config import ConfigError

WIDTH = 128  # K and V of every case that names no other
NUM_LAYERS = 80
MIDDLE_LAYER = 40
STATE_BYTES = WIDTH * WIDTH * 4  # of one sequence and head in decoding, fp32

_MILLION = 2**20

SWEEP_HEADS = 4  # one slope per head at every length; the published million-token shape
SWEEP_TOKENS = _MILLION  # of one sweep case up to a million; longer ones have one sequence
SOFTMAX_MAX_TOKENS = _MILLION  # one run at a million takes 3.7 s, and four times that at two


class Task(StrEnum):
    """What is timed."""

    FORWARD = "forward"
    BACKWARD = "forward + backward"
    MEMORY = "extra memory of forward + backward"
    DECODE = "decode"
    VERIFY = "verify"


@dataclass(frozen=True)
class Case:
    """One row of the benchmark's table, before anyone has run it.

    groups are the tables that it is in. B is the batch, T the tokens of a row (in decoding 1, in
    verification the draft), H the heads, width K and V of whole sequences.
    lengths, where given, are the documents packed into the one row. A target is a time in seconds,
    of MEMORY bytes.
    """

    name: str
    groups: tuple[str, ...]
    task: Task
    B: int
    T: int
    H: int
    layer: int = MIDDLE_LAYER
    width: int = WIDTH
    lengths: tuple[int, ...] | None = None
    target: float | None = None


def all_cases() -> list[Case]:
    """Return every case, in the order of the table."""
    return [*_forward(), *_backward(), *_decoding(), *_layers(), *_packed(), *_widths(), *_sweep()]


def group_names() -> list[str]:
    """Return the names by which groups of cases are picked, in the order of the table."""
    return list(dict.fromkeys(name for case in all_cases() for name in case.groups))


def cases_of(groups: Sequence[str]) -> list[Case]:
    """Return the cases of some groups; of all when none is named.

    Raises:
        ConfigError: a group is unknown.
    """
    known = group_names()
    for group in groups:
        if group not in known:
            raise ConfigError(f"cases must be of {', '.join(known)}, got {group}")
    return [case for case in all_cases() if not groups or {*groups} & {*case.groups}]


def _named(task: Task, B: int, T: int, H: int) -> str:
    return f"{task} B{B} T{T} H{H}"


def _forward() -> list[Case]:
    shapes = (
        (1, 32_768, 64, 0.56e-3),
        (8, 4096, 64, 0.58e-3),
        (64, 512, 64, 0.60e-3),
        (1, 131_072, 8, 0.33e-3),
        (1, _MILLION, 4, 1.20e-3),
    )
    return [
        Case(
            _named(Task.FORWARD, B, T, H),
            ("forward", "sweep") if T == _MILLION else ("forward",),
            Task.FORWARD,
            *(B, T, H),
            target=target,
        )
        for B, T, H, target in shapes
    ]


def _backward() -> list[Case]:
    task, shapes = Task.BACKWARD, ((1, 32_768, 64, 2.2e-3), (64, 512, 64, None))
    timed = [
        Case(_named(task, B, T, H), ("backward",), task, B, T, H, target=target)
        for B, T, H, target in shapes
    ]
    name = "extra memory B1 T65536 H64"
    return [*timed, Case(name, ("memory",), Task.MEMORY, 1, 65_536, 64, target=1e8)]


def _decoding() -> list[Case]:
    targets = {1: 6e-6, 128: 0.19e-3}
    steps = [
        Case(f"decode B{B} H64", ("decode",), Task.DECODE, B, 1, 64, target=targets.get(B))
        for B in (1, 16, 64, 128, 256)
    ]
    name = "verify 4 tokens B64 H64"
    return [*steps, Case(name, ("verify",), Task.VERIFY, 64, 4, 64, target=0.17e-3)]


def _layers() -> list[Case]:
    """The fastest (first) and the slowest layers, beside the middle layer of `forward`.

    78 is the last lightning layer of the released model; the rule gives layer 79 all but no decay.
    """
    task, shapes = Task.FORWARD, ((1, 32_768, 64), (1, 131_072, 8))
    return [
        Case(f"{_named(task, *shape)} layer {layer}", ("layers",), task, *shape, layer)
        for shape in shapes
        for layer in (0, NUM_LAYERS - 2, NUM_LAYERS - 1)
    ]


def _packed() -> list[Case]:
    """The tokens of forward B1 T32768 H64 as documents."""
    packings = {
        "uniform": (1024,) * 32,
        # From 16,384 down to 1, halving, and one more token.
        "skewed": (*(2**n for n in range(14, -1, -1)), 1),
    }
    shape = (1, 32_768, 64)
    return [
        Case(f"packed {kind} T32768 H64", ("packed",), Task.FORWARD, *shape, lengths=lengths)
        for kind, lengths in packings.items()
    ]


def _widths() -> list[Case]:
    """Other widths, at about the bytes of forward B1 T32768 H64."""
    return [
        Case(f"{_named(task, 1, 32_768, H)} D{width}", ("widths",), task, 1, 32_768, H, width=width)
        for task in (Task.FORWARD, Task.BACKWARD)
        for H, width in ((128, 64), (64, 96), (32, 256))
    ]


def _sweep() -> list[Case]:
    """The length at all but a million tokens, which `forward` has."""
    shapes = ((max(1, SWEEP_TOKENS // 2**n), 2**n, SWEEP_HEADS) for n in range(7, 23))
    return [
        Case(f"sweep T{shape[1]}", ("sweep",), Task.FORWARD, *shape)
        for shape in shapes
        if shape[1] != _MILLION
    ]
