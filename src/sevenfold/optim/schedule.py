"""Learning-rate schedules as pure functions of the step."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sevenfold.config import ConfigError, StrictModel

DecayShape = Literal["linear", "exponential", "1-sqrt"]
COSINE_MIN_RATIO = 0.1
_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]
_Ratio = Annotated[float, Field(ge=0.0, le=1.0)]

# Option -> the kinds in which it has an effect.
_EFFECTIVE = {
    "min_ratio": ("cosine", "wsd"),
    "decay_steps": ("wsd",),
    "decay_shape": ("wsd",),
}


class ScheduleConfig(StrictModel):
    """How the learning rate moves: warm-up, then constant, cosine, or stable and decay (wsd).

    Args:
        kind: "constant", "cosine", or "wsd" (warm-up, stable, decay).
        warmup_steps: steps of linear warm-up; step 0 has 1 / warmup_steps of the rate.
        min_ratio: what the decay falls towards, as a share of the rate; cosine 0.1, wsd 0 if None.
        decay_steps: last steps of wsd, which decay.
        decay_shape: "linear", "exponential" or "1-sqrt" (if None); exponential needs a min_ratio.
    """

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: _Count = 0
    min_ratio: _Ratio | None = None
    decay_steps: _Positive | None = None
    decay_shape: DecayShape | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, kinds in _EFFECTIVE.items():
            value = getattr(self, name)
            if value is not None and self.kind not in kinds:
                raise ValueError(
                    f"{name} must be left out with kind = {self.kind!r}, where it has no effect, "
                    f"got {value!r}"
                )
        if self.kind == "wsd" and self.decay_steps is None:
            raise ValueError("decay_steps must be given with kind = 'wsd', got none")
        if self.decay_shape == "exponential" and not self.min_ratio:
            raise ValueError(
                f"min_ratio must be above 0 with decay_shape = 'exponential', got {self.min_ratio}"
            )
        return self

    def check_fits(self, num_steps: int) -> None:
        """Raise unless warm-up and decay fit into a run of num_steps.

        Raises:
            ConfigError: they do not.
        """
        needed = self.warmup_steps + (self.decay_steps or 0)
        if needed > num_steps:
            raise ConfigError(
                f"warmup_steps + decay_steps must not exceed the run's {num_steps} steps, "
                f"got {needed}"
            )


def lr_multiplier(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """Return the share of the configured learning rate that one step takes.

        s < W                  (s + 1) / W
        constant               1
        cosine                 m + (1 - m) (1 + cos(pi p)) / 2       p = (s - W) / (S - W)
        wsd, s >= S - D        linear       1 - (1 - m) p            p = (s - S + D) / D
                               exponential  m^p
                               1-sqrt       1 - (1 - m) sqrt(p)

    with W = warmup_steps, D = decay_steps, m = min_ratio. It would reach m at s = S.

    Args:
        schedule: the schedule.
        step: s, updates done so far, 0 to num_steps - 1.
        num_steps: S, updates of the whole run.

    Returns:
        The multiplier, 0 to 1.

    Source: cosine, arXiv 1608.03983; wsd, 2404.06395 (MiniCPM); 1-sqrt, 2405.18392.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        span = num_steps - schedule.warmup_steps
        return _cosine((step - schedule.warmup_steps) / span, schedule.min_ratio)
    if schedule.kind == "wsd" and schedule.decay_steps is not None:
        past = step - (num_steps - schedule.decay_steps)
        return _decay(schedule, max(past, 0) / schedule.decay_steps)
    return 1.0


def _cosine(progress: float, min_ratio: float | None) -> float:
    low = COSINE_MIN_RATIO if min_ratio is None else min_ratio
    return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2


def _decay(schedule: ScheduleConfig, progress: float) -> float:
    low = schedule.min_ratio or 0.0
    if schedule.decay_shape == "linear":
        return 1 - (1 - low) * progress
    if schedule.decay_shape == "exponential":
        return low**progress
    return 1 - (1 - low) * math.sqrt(progress)
