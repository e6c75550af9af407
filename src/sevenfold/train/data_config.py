"""What a run file says about its data."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from sevenfold.config import StrictModel

_Positive = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0.0, lt=1.0)]

# The source of a run that names a path alone.
ONLY_SOURCE = "data"


class SourceSection(StrictModel):
    """One source of a mixture.

    Args:
        name: as stages that follow each other and messages call it.
        path: folder that `sevenfold data prepare` made.
        weight: share of the rows at the beginning, in proportion to the other sources'.
        end_weight: what it becomes by the end of the transition; None keeps it.
        begin_share: from which share of data.mixture_tokens on the source takes part; above 0 its
            weight is its share of the rows itself, and the others divide what is left.
        min_tokens: only documents of so many tokens.
        max_tokens: only documents of fewer tokens; None is any number.
        max_epochs: refuse a run that would read the source more often; None allows any number.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    path: Path
    weight: Annotated[float, Field(ge=0)] = 1.0
    end_weight: Annotated[float, Field(ge=0)] | None = None
    begin_share: _Share = 0.0
    min_tokens: _Positive = 1
    max_tokens: _Positive | None = None
    max_epochs: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens is not None and self.max_tokens <= self.min_tokens:
            raise ValueError(
                f"max_tokens must be above min_tokens = {self.min_tokens}, got {self.max_tokens}"
            )
        if self.begin_share > 0 and (self.end_weight is not None or self.weight >= 1):
            raise ValueError(
                f"weight must be a share below 1 without end_weight where begin_share is above 0, "
                f"got {self.weight} and {self.end_weight}"
            )
        return self


class DataSection(StrictModel):
    """One prepared dataset, or several in a mixture, and the row length.

    Args:
        path: folder that `sevenfold data prepare` made; None with sources.
        seq_len: tokens of a row.
        max_epochs: refuse a run that would read `path` more often; None allows any number.
        sources: of a mixture, in place of path.
        mixture_tokens: over which weights move and begin_share counts; needed where one does.
        transition_share: share of mixture_tokens by which weights have reached their ends; None
            is 1.
    """

    path: Path | None = None
    seq_len: _Positive = 1024
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    sources: tuple[SourceSection, ...] = ()
    mixture_tokens: _Positive | None = None
    transition_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (not self.sources):
            got = "neither" if self.path is None else "both"
            raise ValueError(f"data must have either path or sources, got {got}")
        if self.path is not None:
            for name in ("mixture_tokens", "transition_share"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} must be left out without sources, got one")
        elif self.max_epochs is not None:
            raise ValueError("max_epochs must stand in each source, got it beside sources")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources must have different names, got {names}")
        if self.sources:
            self._check_mixture()
        return self

    def _check_mixture(self) -> None:
        moving = [s for s in self.sources if s.begin_share == 0]
        for weights in ([s.weight for s in moving], [_end_weight(s) for s in moving]):
            if sum(weights) <= 0:
                raise ValueError(
                    f"sources that begin with the run must have a weight above 0, got {weights}"
                )
        late = sum(s.weight for s in self.sources if s.begin_share > 0)
        if late >= 1:
            raise ValueError(f"sources with a begin_share must leave room for others, got {late}")
        if self.mixture_tokens is None and self._moves():
            raise ValueError(
                "mixture_tokens must be given where weights change, got none; it is the tokens "
                "over which they do, so that a longer run reads the same rows"
            )

    def _moves(self) -> bool:
        return any(s.begin_share > 0 or _end_weight(s) != s.weight for s in self.sources)

    def all_sources(self) -> tuple[SourceSection, ...]:
        """Return the sources; a path alone is one."""
        if self.path is None:
            return self.sources
        return (SourceSection(name=ONLY_SOURCE, path=self.path, max_epochs=self.max_epochs),)


def _end_weight(source: SourceSection) -> float:
    return source.weight if source.end_weight is None else source.end_weight
