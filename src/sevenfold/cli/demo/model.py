"""What the tour hands to its report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = "It is a truth universally acknowledged, that"


@dataclass(frozen=True)
class TrainedModel:
    """One of the three models: where it lies, how it learned, and what it writes."""

    form: str
    checkpoint: Path
    metrics: list[dict[str, Any]]
    sample: str
