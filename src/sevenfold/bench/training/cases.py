"""What `sevenfold bench train` measures: models, shapes, targets."""

from collections.abc import Sequence
from dataclasses import dataclass

from sevenfold.config import ConfigError, unknown_name
from sevenfold.models import ModelConfig, preset

OURS, PEER = "sevenfold", "transformers"
SIDES = (OURS, PEER)
GROUPS = ("step", "mfu", "context", "longest")

_CONTEXT_TOKENS = 131_072  # of a step, at every length
_SHORTEST = 2048
# Presets and divisor of the cases that a CPU runs in seconds, to see that all of it works.
_TINY = {"bench-2b": "bench-19m", "1b-hybrid": "nano-hybrid", "1b-softmax": "nano-softmax"}
_TINY_DIVISOR = 64


@dataclass(frozen=True)
class Case:
    """One training step of one side.

    Args:
        group: of GROUPS.
        side: of SIDES.
        model: name of a preset.
        rows: of a step, all in one micro-batch.
        tokens: of a row, one document.
        recompute: whether every block is computed again in the backward.
        target_tokens_per_s: to reach, on one H200; None without one.
        target_share: of the measured rate of products to reach; None without one.
    """

    group: str
    side: str
    model: str
    rows: int
    tokens: int
    recompute: bool = False
    target_tokens_per_s: float | None = None
    target_share: float | None = None

    @property
    def name(self) -> str:
        """As tables and options say it."""
        return f"{self.model} {self.rows} x {self.tokens:,}"

    @property
    def config(self) -> ModelConfig:
        """The model; it rotates whole heads where it has a peer, which knows nothing else."""
        named = preset(self.model)
        reach = {"max_position_embeddings": max(named.max_position_embeddings, self.tokens)}
        if self.group == "step":
            reach["rotary_dim"] = named.head_dim
        return named.model_copy(update=reach)


def cases_of(
    groups: Sequence[str] = (),
    sides: Sequence[str] = (),
    names: Sequence[str] = (),
    *,
    tiny: bool = False,
) -> list[Case]:
    """Return the cases of some groups, sides and names; none of a kind takes all.

    Args:
        groups: of GROUPS.
        sides: of SIDES.
        names: parts of the cases' names, such as "1 x 32,768" or "1b-softmax".
        tiny: small models and a 64th of the tokens, for a CPU.

    Returns:
        The cases, in the order of the tables.

    Raises:
        ConfigError: a group or side is unknown, or nothing has such a name.
    """
    for kind, given, known in (("group", groups, GROUPS), ("side", sides, SIDES)):
        for name in given:
            if name not in known:
                raise ConfigError(unknown_name(kind, name, known))
    built = _all(tiny)
    found = [
        case
        for case in built
        if case.group in (groups or GROUPS)
        and case.side in (sides or SIDES)
        and (not names or any(name in case.name for name in names))
    ]
    if not found:
        known = ", ".join(dict.fromkeys(case.name for case in built))
        raise ConfigError(f"only must be a part of a chosen case's name, got {names}; all: {known}")
    return found


def _all(tiny: bool) -> list[Case]:
    divisor = _TINY_DIVISOR if tiny else 1

    def case(
        group: str, side: str, model: str, rows: int, tokens: int, **more: bool | float | None
    ) -> Case:
        name = _TINY[model] if tiny else model
        return Case(group, side, name, rows, tokens // divisor, **more)  # type: ignore[arg-type]

    built = []
    for rows, tokens, target in ((8, 2048, 75e3), (4, 8192, 75e3), (1, 32_768, 65e3)):
        reach = {"target_tokens_per_s": None if tiny else target}
        built.append(case("step", OURS, "bench-2b", rows, tokens, **reach))
        built.append(case("step", PEER, "bench-2b", rows, tokens))
    share = None if tiny else 0.5
    built.append(case("mfu", OURS, "1b-hybrid", 2, 8192, target_share=share))
    for model in ("1b-hybrid", "1b-softmax"):
        tokens = _SHORTEST
        while tokens <= _CONTEXT_TOKENS:
            rows = _CONTEXT_TOKENS // tokens
            built.append(case("context", OURS, model, rows, tokens, recompute=True))
            tokens *= 2
    # On a GPU the row becomes the longest that is predicted to fit.
    built.append(case("longest", OURS, "1b-hybrid", 1, _CONTEXT_TOKENS, recompute=True))
    return built
