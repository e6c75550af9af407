"""How one state's bytes are laid out in its item: which array of which layer lies where."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from sevenfold.engine.precision import StateFormat
from sevenfold.models import ModelConfig

# "token" is the model's own dtype, in which keys and values come.
Element = Literal["fp32", "int32", "bf16", "fp16", "int8", "token"]
Part = Literal["codes", "scale", "ring_k", "ring_v", "count"]

RING_TOKENS = 16  # fewest bytes a token for heads of 128 in bf16: sqrt(4 K V / (K + V))

_BYTES: dict[str, int] = {"fp32": 4, "int32": 4, "bf16": 2, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Section:
    """One array of an item: of some heads of one linear layer.

    layer: index among the linear layers. heads: which ones, in the order of the first dimension.
    """

    layer: int
    part: Part
    heads: tuple[int, ...]
    element: Element
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class StateLayout:
    """All arrays of an item, each with its offset in bytes; wide elements first, so none is split.

    num_heads: format -> how many heads of all linear layers have it.
    """

    sections: tuple[tuple[int, Section], ...]
    num_bytes: int
    num_heads: dict[StateFormat, int]


def lay_out_states(
    config: ModelConfig,
    formats: Sequence[Sequence[StateFormat]],
    *,
    token_bytes: int,
    ring_tokens: int | None,
) -> StateLayout:
    """Lay out the state of one sequence.

        bytes of a head:    fp32 4 D^2    bf16 2 D^2    fp16 2 D^2 + 4    int8 D^2 + 4 D
        a ring adds         2 R D token_bytes + 4

    Args:
        config: the model, D = head_dim.
        formats: [linear layers][heads]; fp16 with one fp32 scale for each head, int8 with one for
            each head and key channel.
        token_bytes: of one element of a key in a ring.
        ring_tokens: R; None lays out no ring.

    Returns:
        The layout.
    """
    sections = [
        section
        for layer, heads in enumerate(formats)
        for section in (
            *_states(layer, heads, config.head_dim),
            *(() if ring_tokens is None else _ring(layer, config, ring_tokens, token_bytes)),
        )
    ]
    placed, at = [], 0
    for section in sorted(sections, key=lambda s: -_width(s, token_bytes)):
        placed.append((at, section))
        at += section.num_bytes
    counts: Counter[StateFormat] = Counter(name for heads in formats for name in heads)
    return StateLayout(tuple(placed), at, dict(counts))


def _states(layer: int, formats: Sequence[StateFormat], D: int) -> list[Section]:
    found = []
    for name in dict.fromkeys(formats):
        heads = tuple(head for head, own in enumerate(formats) if own == name)
        h = len(heads)
        found.append(_section(layer, "codes", heads, name, (h, D, D)))
        if name == "fp16":
            found.append(_section(layer, "scale", heads, "fp32", (h,)))
        if name == "int8":
            found.append(_section(layer, "scale", heads, "fp32", (h, D)))
    return found


def _ring(layer: int, config: ModelConfig, R: int, token_bytes: int) -> list[Section]:
    H, D = config.num_attention_heads, config.head_dim
    heads, size = tuple(range(H)), H * R * D * token_bytes
    k, v = (Section(layer, part, heads, "token", (H, R, D), size) for part in ("ring_k", "ring_v"))
    return [k, v, _section(layer, "count", heads, "int32", (H,))]


def _section(
    layer: int, part: Part, heads: tuple[int, ...], element: Element, shape: tuple[int, ...]
) -> Section:
    return Section(layer, part, heads, element, shape, prod(shape) * _BYTES[element])


def _width(section: Section, token_bytes: int) -> int:
    return token_bytes if section.element == "token" else _BYTES[section.element]
