"""How `sevenfold serve` guesses tokens: what it was asked, and the smaller model that does it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sevenfold.config import ConfigError, parse_config
from sevenfold.engine import TextModel
from sevenfold.engine.speculation import (
    DraftModel,
    DraftModelConfig,
    PromptLookupConfig,
    SpeculationConfig,
)

_DRAFT_MEMORY_BYTES = 1 << 29

DraftTokens = Annotated[
    int | None, typer.Option(help="Guesses a step; none if left, 5 with a draft model.")
]
DraftCheckpoint = Annotated[
    Path | None,
    typer.Option(help="A smaller checkpoint that guesses; else the text so far is copied."),
]
DraftMemory = Annotated[
    float | None, typer.Option(help="Of the memory, for its states and keys; 0.5 if left.")
]
DraftBranches = Annotated[
    int | None, typer.Option(help="Continuations guessed side by side; 1 if left.")
]


@dataclass(frozen=True)
class Guessing:
    """Options of the command line; None where one was left out."""

    draft_tokens: int | None
    draft_branches: int | None
    draft_model: Path | None
    draft_memory_bytes: int | None

    def config(self) -> SpeculationConfig | None:
        """Return what the engine may do; None for no guesses.

        Raises:
            ConfigError: an option breaks its rule, or has no effect beside the others.
        """
        values: dict[str, Any] = {
            "draft_tokens": self.draft_tokens,
            "branches": self.draft_branches,
        }
        values = {name: value for name, value in values.items() if value is not None}
        if self.draft_model is not None:
            given = self.draft_memory_bytes
            values["memory_bytes"] = _DRAFT_MEMORY_BYTES if given is None else given
            return parse_config(DraftModelConfig, values, "serve")
        if self.draft_memory_bytes is not None:
            raise ConfigError("serve: draft_memory_gib must be left out without draft_model")
        if self.draft_tokens:
            return parse_config(PromptLookupConfig, values, "serve")
        if self.draft_branches is not None:
            raise ConfigError("serve: draft_branches must be left out without drafts")
        return None

    def load(self, device: str, dtype: torch.dtype | None) -> DraftModel | None:
        """Load the smaller model beside the one that it guesses for; None if there is none."""
        if self.draft_model is None:
            return None
        source = TextModel.load(self.draft_model, device=device, dtype=dtype)
        return DraftModel(source.model, source.tokenizer)
