"""From an engine's options to how its model is run, and which of them exclude each other."""

from collections.abc import Sequence

from sevenfold.config import ConfigError
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.speculation import SpeculationConfig
from sevenfold.engine.worker import WorkerConfig


def worker_config(
    config: SchedulerConfig,
    decode_batch_sizes: Sequence[int] | None,
    speculation: SpeculationConfig | None,
) -> WorkerConfig:
    """Return how an engine of these options has its model run."""
    return WorkerConfig(
        max_running=config.max_running,
        decode_batch_sizes=None if decode_batch_sizes is None else tuple(decode_batch_sizes),
        draft_tokens=0 if speculation is None else speculation.draft_tokens,
        draft_trees=speculation is not None and speculation.branches > 1,
        chunk_tokens=config.grain_tokens if config.batch_invariant else None,
    )


def check_invariant(plan: MemoryPlan, speculation: SpeculationConfig | None) -> None:
    """Raise ConfigError where bits depend on what was cached or guessed, whatever is run alone."""
    if speculation is not None:
        raise ConfigError(
            "speculation must be None with batch_invariant: a step that checks guesses adds up "
            f"otherwise than one without, got a {type(speculation).__name__}"
        )
    dtypes = (plan.state_dtype, plan.snapshot_dtype)
    if plan.has_states and dtypes != ("fp32", "fp32"):
        raise ConfigError(
            "state_dtype and snapshot_dtype must be fp32 with batch_invariant: a state that was "
            "rounded into the cache is not the one that would be computed, got {} and {}".format(
                *dtypes
            )
        )
