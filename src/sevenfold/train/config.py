"""What a run file can say."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from sevenfold.config import ConfigError, StrictModel, parse_config, read_toml
from sevenfold.models import ModelConfig
from sevenfold.models.presets import resolve_model
from sevenfold.optim import OptimizerConfig, ScheduleConfig
from sevenfold.parallel import ParallelConfig
from sevenfold.train.data_config import DataSection

_Positive = Annotated[int, Field(ge=1)]
_NonNegative = Annotated[int, Field(ge=0)]


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    return name


class RunSection(StrictModel):
    """Where, how long, and what to write.

    Args:
        out: the run directory.
        start_from: directory of a run whose weights, moments and place in the data this one begins
            with; None begins anew.
        steps: updates of the whole run.
        seed: of the initial weights and the order of the data.
        device: "cpu", "cuda" or "cuda:N".
        num_threads: of the CPU; None leaves PyTorch's number.
        deterministic: refuse operators that are not; bit-identity on a GPU needs it.
        checkpoint_every_steps: besides the checkpoint at the end of the run.
        keep_checkpoints: newest checkpoints that are kept.
        async_checkpoints: write them beside the next steps, from a copy in the host's memory.
        log_every_steps: between plain lines; metrics.jsonl has every step.
        tensorboard: also write TensorBoard's files (needs the extra).
        trackio: project of a Trackio dashboard to log to, too (needs the extra).
        peak_flops: of the device, FLOP/s, for utilisation; None takes it from a table of GPUs.
    """

    out: Path
    start_from: Path | None = None
    steps: _Positive
    seed: _NonNegative = 0
    device: Annotated[str, AfterValidator(_device)] = "cpu"
    num_threads: _Positive | None = None
    deterministic: bool = False
    checkpoint_every_steps: _Positive = 500
    keep_checkpoints: _Positive = 2
    async_checkpoints: bool = False
    log_every_steps: _Positive = 10
    tensorboard: bool = False
    trackio: str | None = None
    peak_flops: Annotated[float, Field(gt=0)] | None = None


class RampStage(StrictModel):
    """From the step that begins after from_tokens, a step has tokens_per_step."""

    from_tokens: _Positive
    tokens_per_step: _Positive


class CriticalBatch(StrictModel):
    """Double a step's tokens as the loss falls: the critical batch grows by a power of it.

        B(loss) = coefficient * loss^-exponent        tokens

    The defaults are what the published doublings of MiniMax-01 imply: 16 M tokens at a loss of
    2.22, 32 M at 1.98, 64 M at 1.77, 128 M at 1.58. The loss is that of its data and vocabulary.

    Args:
        max_tokens_per_step: no doubling goes beyond.
        coefficient, exponent: of the law, > 0.
        smoothing_steps: of the loss: each update moves the mean by a share of one over these.

    Source: arXiv 2501.08313 section 4.2 and figure 13.
    """

    max_tokens_per_step: _Positive
    coefficient: Annotated[float, Field(gt=0)] = 2.1e9
    exponent: Annotated[float, Field(gt=0)] = 6.12
    smoothing_steps: _Positive = 100

    def tokens_at(self, loss: float) -> float:
        """Return the critical batch, tokens."""
        return self.coefficient * loss**-self.exponent


class BatchSection(StrictModel):
    """How many tokens make a step.

    Args:
        tokens_per_step: tokens of a step, a multiple of seq_len.
        micro_batch_rows: rows that go through the model at once, gradients accumulating; the
            last micro-batch of a step may have fewer. None takes a whole step at once.
        ramp: later sizes of a step, by tokens read so far, rising.
        critical: doubles tokens_per_step by the loss, in place of a ramp.
    """

    tokens_per_step: _Positive
    micro_batch_rows: _Positive | None = None
    ramp: tuple[RampStage, ...] = ()
    critical: CriticalBatch | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        starts = [stage.from_tokens for stage in self.ramp]
        if any(b <= a for a, b in pairwise(starts)):
            raise ValueError(f"ramp must have rising from_tokens, got {starts}")
        if self.critical is not None and self.ramp:
            raise ValueError("ramp must be left out with critical, which decides, got both")
        return self

    def sizes(self) -> list[int]:
        """Return every number of tokens that a step can have."""
        found = [self.tokens_per_step, *(stage.tokens_per_step for stage in self.ramp)]
        while self.critical is not None and 2 * found[-1] <= self.critical.max_tokens_per_step:
            found.append(2 * found[-1])
        return found

    def tokens_at(self, tokens_read: int) -> int:
        """Return the tokens of the step that begins after tokens_read tokens."""
        reached = [stage for stage in self.ramp if stage.from_tokens <= tokens_read]
        return reached[-1].tokens_per_step if reached else self.tokens_per_step


class PrecisionSection(StrictModel):
    """In what the model computes; weights, gradients and moments are always fp32.

    Args:
        autocast: "bf16" takes products in bf16; None leaves all in fp32.
        stream: "bf16" keeps the residual stream in bf16 too, with autocast only: norms and sums
            move half the bytes, and a recomputed block keeps half. None keeps it in fp32.
    """

    autocast: Literal["bf16"] | None = None
    stream: Literal["bf16"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream is not None and self.autocast is None:
            raise ValueError(
                f"stream must be left out without autocast, which gives the products that it is "
                f"made of, got {self.stream!r}"
            )
        return self


class CompileSection(StrictModel):
    """Whether torch.compile fuses norms and dense feed-forwards (on a CPU in fp32 norms alone).

    Mixers stay eager: they see where documents end, and each new packing would compile anew.
    """

    enabled: bool = False


class CheckpointingSection(StrictModel):
    """What blocks keep for the backward.

    Args:
        every_layers: recompute every k-th block instead of keeping its activations; None: none.
        keep_attention: of a recomputed block what softmax attention gave, on a GPU, instead of
            computing that again.
    """

    every_layers: _Positive | None = None
    keep_attention: bool = True


class GuardSection(StrictModel):
    """When a step is skipped, when the run goes back, and when its silence is reported.

    Args:
        max_skipped_steps: steps in a row that may be skipped before the run ends with an error.
        spike_deviations: skip a step, too, whose loss or gradient norm lies above the mean of the
            last spike_window updates by more than so many standard deviations; None keeps all.
        spike_window: updates that make the mean; before there are as many, none is a spike.
        rewind_after_skips: after so many skipped steps in a row, go back to the newest checkpoint's
            weights and moments, and on with the samples that come next; None goes back never.
        max_rewinds: in the whole run.
        stall_s: seconds without a sign of life after which a line in stalls.jsonl says which ranks
            the run waits for; None watches nothing.
        exit_stalled_s: seconds after which the process ends, so that torchrun starts all anew;
            None waits on.
    """

    max_skipped_steps: _NonNegative = 10
    spike_deviations: Annotated[float, Field(gt=0)] | None = None
    spike_window: Annotated[int, Field(ge=2)] = 128
    rewind_after_skips: _Positive | None = None
    max_rewinds: _NonNegative = 3
    stall_s: Annotated[float, Field(gt=0)] | None = None
    exit_stalled_s: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        rewind = self.rewind_after_skips
        if rewind is not None and rewind > self.max_skipped_steps:
            raise ValueError(
                f"rewind_after_skips must not exceed max_skipped_steps = {self.max_skipped_steps}, "
                f"which ends the run, got {rewind}"
            )
        if self.exit_stalled_s is not None:
            self._check_exit(self.exit_stalled_s)
        return self

    def _check_exit(self, exit_stalled_s: float) -> None:
        if self.stall_s is None:
            raise ValueError(
                f"exit_stalled_s must be left out without stall_s, which watches the run, got "
                f"{exit_stalled_s}"
            )
        if exit_stalled_s < self.stall_s:
            raise ValueError(
                f"exit_stalled_s must be at least stall_s = {self.stall_s}, got {exit_stalled_s}"
            )


class ValidationSection(StrictModel):
    """Evaluate on the first num_samples rows of the validation split every so many steps."""

    every_steps: _Positive
    num_samples: _Positive = 16


class RunConfig(StrictModel):
    """One training run, complete and frozen; load_run_config reads it from a file."""

    run: RunSection
    data: DataSection
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchSection
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionSection = PrecisionSection()
    compile: CompileSection = CompileSection()
    checkpointing: CheckpointingSection = CheckpointingSection()
    guard: GuardSection = GuardSection()
    validation: ValidationSection | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.schedule.check_fits(self.run.steps)
        seq_len = self.data.seq_len
        sizes = self.batch.sizes()
        for size in sizes:
            if size % seq_len:
                raise ValueError(
                    f"tokens_per_step must be a multiple of seq_len = {seq_len}, got {size}"
                )
        rows = self.batch.micro_batch_rows
        if rows is not None and rows * seq_len > max(sizes):
            raise ValueError(
                f"micro_batch_rows must not exceed the {max(sizes) // seq_len} rows of a step, "
                f"got {rows}"
            )
        every = self.checkpointing.every_layers
        if every is not None and every > self.model.num_hidden_layers:
            raise ValueError(
                f"every_layers must not exceed the model's {self.model.num_hidden_layers} layers, "
                f"got {every}"
            )
        if self.compile.enabled and self.parallel.num_ranks > 1:
            raise ValueError(
                f"compile.enabled must be false with {self.parallel.num_ranks} ranks, whose "
                f"exchanges it does not compile, got true"
            )
        if self.parallel.gather_dtype is not None and self.precision.autocast is None:
            raise ValueError(
                f"parallel.gather_dtype must be unset without precision.autocast, whose products "
                f"alone take rounded weights, got {self.parallel.gather_dtype!r}"
            )
        for name in ("expert_exchange", "weight_exchange"):
            if getattr(self.parallel, name) == "copies" and self.run.device == "cpu":
                raise ValueError(
                    f'parallel.{name} must be "collective" with run.device = "cpu", which has no '
                    f'copy engine, got "copies"'
                )
        self.parallel.check_model(self.model)
        for size in sizes:
            rows = size // seq_len
            self.parallel.check_micro_batches(rows, min(self.batch.micro_batch_rows or rows, rows))
        for rows, rule in self._micro_batches(sizes).items():
            self.parallel.check_rows(rows, seq_len, rule=rule)
        return self

    def _micro_batches(self, sizes: list[int]) -> dict[int, str]:
        """Rows of each micro-batch that a step, or validation, can have, and which one it is."""
        found: dict[int, str] = {}
        totals = {size // self.data.seq_len: "a step" for size in sizes}
        if self.validation is not None:
            totals[self.validation.num_samples] = "validation"
        for total, whose in totals.items():
            size = min(self.batch.micro_batch_rows or total, total)
            found[size] = f"a micro-batch of {whose}"
            if total % size:
                found[total % size] = f"the last micro-batch of {whose}"
        return found

    def total_rows(self) -> int:
        """Return the rows of all steps; where the loss decides, the most that they can be."""
        if self.batch.critical is not None:
            return self.run.steps * self.batch.sizes()[-1] // self.data.seq_len
        if not self.batch.ramp:
            return self.run.steps * self.rows_at(0)
        rows = 0
        for _ in range(self.run.steps):
            rows += self.rows_at(rows)
        return rows

    def rows_at(self, next_sample: int) -> int:
        """Return the rows of the step that begins with a sample."""
        seq_len = self.data.seq_len
        return self.batch.tokens_at(next_sample * seq_len) // seq_len


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file.

    Args:
        path: TOML; its [model] may name a `preset` with ModelConfig's fields laid over it.
        overrides: each `dotted.key=value`.

    Returns:
        The configuration, the model resolved.

    Raises:
        ConfigError: a key is unknown (the nearest is named) or missing, or a value breaks a rule.
    """
    values = read_toml(path, overrides)
    table = values.get("model")
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: model must be a table, got {table!r}")
    resolved = dict(values)
    resolved["model"] = _plain(resolve_model(table, f"{path}: model"))
    return parse_config(RunConfig, resolved, str(path))


def _plain(config: ModelConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")
