"""From what is asked of an engine to its model, its memory and its limits, whoever drives it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sevenfold.config import check_type
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.precision import Precision
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.sizing import size_engine
from sevenfold.engine.speculation import SpeculationConfig
from sevenfold.engine.text_model import TextModel


@dataclass(frozen=True)
class EngineOptions:
    """What sf.LLM and `sevenfold serve` ask of an engine; None leaves the choice to it.

    precision: bits of weights, running states and cached states.
    memory_bytes, host_bytes: of each rank, on its device and of the host.
    context_tokens: what one request must be able to reach.
    tensor_parallel: ranks that divide the model.
    """

    device: str | None
    dtype: torch.dtype | None
    precision: Precision
    memory_bytes: int | None
    host_bytes: int
    context_tokens: int | None
    speculation: SpeculationConfig | None
    tensor_parallel: int
    batch_invariant: bool

    def __post_init__(self) -> None:
        dtypes = torch.dtype | None
        check_type("dtype", self.dtype, dtypes, "a dtype of torch, as torch.bfloat16, or None")
        for name in ("memory_bytes", "context_tokens"):
            check_type(name, getattr(self, name), int | None, "an integer or None")
        for name in ("host_bytes", "tensor_parallel"):
            check_type(name, getattr(self, name), int, "an integer")
        rule = "a PromptLookupConfig, a DraftModelConfig or None"
        check_type("speculation", self.speculation, SpeculationConfig | None, rule)

    def load(self, checkpoint: str | Path) -> TextModel:
        """Load a checkpoint as asked; errors as TextModel.load."""
        return TextModel.load(
            checkpoint,
            device=self.device or "cpu",
            dtype=self.dtype,
            weights=self.precision.weights,
            tensor_parallel=self.tensor_parallel,
        )

    def size(self, source: TextModel) -> tuple[MemoryPlan, SchedulerConfig]:
        """Cut the memory and set the limits; errors as size_engine."""
        return size_engine(
            source.model,
            budget_bytes=self.memory_bytes,
            context_tokens=self.context_tokens,
            state_dtype=self.precision.states,
            snapshot_dtype=self.precision.snapshots,
            speculation=self.speculation,
            num_ranks=1 if source.ranks is None else source.ranks.size,
            host_bytes=self.host_bytes,
            batch_invariant=self.batch_invariant,
        )
