"""A whole run: open its folder, resume, train, save, export."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sevenfold.config import CheckpointError, ConfigError
from sevenfold.models import HybridModel, ModelConfig
from sevenfold.models.checkpoint import save_model
from sevenfold.optim import build_optimizer
from sevenfold.parallel import Layout, Pipeline, build_model, groups_by_mesh
from sevenfold.parallel.holding import parameter_names
from sevenfold.train.batch import ALONE, SampleSource
from sevenfold.train.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_for_all,
    read_progress,
    read_weights,
    remove_unfinished,
    run_tensors,
)
from sevenfold.train.config import RunConfig
from sevenfold.train.loop import Trainer, UnreadError, train_steps
from sevenfold.train.metrics import METRICS_FILE, MetricsFile, truncate_metrics
from sevenfold.train.progress import Progress
from sevenfold.train.pulse import remove_signs, watched
from sevenfold.train.ranks import first_for_all, join_ranks
from sevenfold.train.recorder import OnStep, Recorder
from sevenfold.train.run_data import RunData, open_data, training_loader, validation_loader
from sevenfold.train.run_folder import CHECKPOINTS, FINAL, open_run_folder
from sevenfold.train.saving import Saver, open_saver
from sevenfold.train.setting import run_setting
from sevenfold.train.signals import stop_on_signals
from sevenfold.train.speed import FlopsCounter, known_peak_flops
from sevenfold.train.stages import Start, find_start, first_rows, write_start
from sevenfold.train.tensorboard import tensorboard_listener
from sevenfold.train.trackio_sink import trackio_listener
from sevenfold.train.transform import compile_parts, stream_dtype, transform_blocks
from sevenfold.train.validation import ValidationResult, validate
from sevenfold.train.whole_matrices import gathered


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        folder: the run directory.
        final: the exported checkpoint; None if the run was stopped before its end.
        progress: where it stands.
        resumed_step: the step that it went on from; None if it began anew.
        signal_name: of the signal that stopped it; None without one.
        is_first: whether this process is the one that speaks for the run.
    """

    folder: Path
    final: Path | None
    progress: Progress
    resumed_step: int | None
    signal_name: str | None
    is_first: bool = True


def train(config: RunConfig, *, on_step: OnStep | None = None) -> TrainResult:
    """Train, from the beginning or from the newest checkpoint in config.run.out.

    Nothing is printed. SIGTERM and Ctrl-C finish the step, save and return (in the main thread; in
    another one signals keep their meaning). Calling again goes on, under the same [parallel] table
    or another; a run that is complete is only exported again. With torchrun every process calls;
    only the first calls on_step and writes what a run writes once.

    Args:
        config: as load_run_config returns it.
        on_step: called with each step's record, after it is written to metrics.jsonl.

    Returns:
        Where the run stands, and where its model is if it is complete.

    Raises:
        ConfigError: the folder holds another run, or the model does not fit the data.
        DataError: the dataset cannot be read.
        TrainingError: too many steps in a row had to be skipped, or a file could not be written.
        CheckpointError: a checkpoint could not be read or written; earlier ones are whole.
        UnsupportedError: the device, TensorBoard or Trackio is not there.
    """
    data = open_data(config)
    start = find_start(config)
    # Before the folder is written: data that is refused may be changed.
    loader = training_loader(data, first_rows(config, start))
    held_out = _held_out_rows(config)
    with (
        join_ranks(config.parallel, config.run) as (layout, run),
        run_setting(run) as device,
        stop_on_signals() as request,
    ):
        first_for_all(layout, lambda: _prepare_folder(config, data, start))
        newest, begun = _find_newest(config)
        trainer = _build(config, data, loader, device, layout)
        progress = _resume(trainer, newest, start)
        with watched(config.run.out, layout.rank, config.guard) as pulse:
            trainer = replace(trainer, pulse=pulse)
            validation = _validation(trainer, held_out)
            progress = _continue(
                trainer, progress, on_step, lambda: request.received is not None, validation
            )
        final = _export(trainer, data) if progress.step == config.run.steps else None
    stopped_by = None if request.received is None else request.received.name
    return TrainResult(config.run.out, final, progress, begun, stopped_by, layout.is_first)


def _prepare_folder(config: RunConfig, data: RunData, start: Start | None) -> None:
    open_run_folder(config, data.fingerprint)
    write_start(config, start)
    remove_unfinished(config.run.out / CHECKPOINTS)
    remove_signs(config.run.out)


def _find_newest(config: RunConfig) -> tuple[Path | None, int | None]:
    """The newest checkpoint and its step, None in a new run."""
    newest = next(reversed(list_checkpoints(config.run.out / CHECKPOINTS)), None)
    if newest is None:
        return None, None
    done = read_progress(newest).step
    if done > config.run.steps:
        raise ConfigError(
            f"run.steps must be at least the {done} steps that {config.run.out} has done, "
            f"got {config.run.steps}"
        )
    return newest, done


def _build(
    config: RunConfig,
    data: RunData,
    loader: SampleSource,
    device: torch.device,
    layout: Layout = ALONE,
) -> Trainer:
    model = build_model(
        _with_end_of_text(config.model, data),
        layout,
        seed=config.run.seed,
        device=device,
        between=partial(transform_blocks, config=config),
    )
    if config.compile.enabled:
        compile_parts(model, autocast=config.precision.autocast)
    optimizer = build_optimizer(
        model.named_parameters(),
        config.optimizer,
        by_mesh=groups_by_mesh,
        parts=gathered(model, layout),
        names=parameter_names(config.model) if config.parallel.pipeline > 1 else None,
    )
    pipeline = None
    if config.parallel.pipeline > 1:
        pipeline = Pipeline(model, layout, stream=stream_dtype(model, config.precision.stream))
    return Trainer(config, model, optimizer, loader, layout, pipeline)


def _with_end_of_text(config: ModelConfig, data: RunData) -> ModelConfig:
    """The model learns to end a text by the data's token, unless the run file names another."""
    if config.eos_token_id is not None:
        return config
    return config.model_copy(update={"eos_token_id": data.end_of_text_id})


def _resume(trainer: Trainer, checkpoint: Path | None, start: Start | None) -> Progress:
    progress = Progress()
    layout = trainer.layout
    source = checkpoint or (start.checkpoint if start is not None else None)
    if source is not None:
        tensors = run_tensors(trainer.model, trainer.optimizer, layout)
        progress = load_checkpoint(source, tensors, layout=layout)
    if checkpoint is None:
        progress = Progress()  # another run's weights and moments, this one's first step
    metrics = trainer.config.run.out / METRICS_FILE
    first_for_all(layout, lambda: truncate_metrics(metrics, progress.next_sample))
    return progress


def _continue(
    trainer: Trainer,
    progress: Progress,
    on_step: OnStep | None,
    stop: Callable[[], bool],
    validation: Callable[[], ValidationResult] | None,
) -> Progress:
    config, device = trainer.config, trainer.model.device
    listeners = () if on_step is None else (on_step,)
    peak_flops = config.run.peak_flops or known_peak_flops(device, config.precision.autocast)
    run = config.run
    with ExitStack() as stack:
        metrics, folder = None, run.out / CHECKPOINTS
        saver = open_saver(
            folder, run.keep_checkpoints, trainer.layout, asynchronous=run.async_checkpoints
        )
        stack.enter_context(saver)
        if trainer.layout.is_first:
            metrics = stack.enter_context(MetricsFile(run.out / METRICS_FILE))
            listeners += stack.enter_context(tensorboard_listener(run, progress.step))
            listeners += stack.enter_context(trackio_listener(config))
        recorder = Recorder(
            trainer=trainer,
            metrics=metrics,
            listeners=listeners if trainer.layout.is_first else (),
            validate=validation,
            flops=FlopsCounter(config.model),
            peak_flops=peak_flops,
            saver=saver,
        )
        try:
            progress = train_steps(
                trainer,
                progress,
                after_step=recorder,
                stop=stop,
                rewind=partial(_rewind, trainer, saver),
            )
        except UnreadError as error:
            recorder.save(error.progress)
            raise error.cause from error
        recorder.save(progress)
    return progress


def _rewind(trainer: Trainer, saver: Saver) -> Progress | None:
    """Put the newest checkpoint's weights and moments back; its counters, None without one."""
    # One in flight is the newest: left alone, it would get its name when the run comes there again.
    saver.finish()
    newest = newest_for_all(saver.folder, trainer.layout)
    if newest is None:
        return None
    tensors = run_tensors(trainer.model, trainer.optimizer, trainer.layout)
    return load_checkpoint(newest, tensors, layout=trainer.layout)


def _held_out_rows(config: RunConfig) -> SampleSource | None:
    """The rows to validate on; None without [validation]."""
    if config.validation is None:
        return None
    loader, num_rows = validation_loader(config)
    num_samples = config.validation.num_samples
    if num_samples > num_rows:
        raise ConfigError(
            f"validation.num_samples must not exceed the {num_rows} rows of "
            f"the validation split, got {num_samples}"
        )
    return loader


def _validation(
    trainer: Trainer, loader: SampleSource | None
) -> Callable[[], ValidationResult] | None:
    config = trainer.config
    if config.validation is None or loader is None:
        return None
    return partial(
        validate,
        trainer.model,
        loader,
        config.validation.num_samples,
        micro_batch_rows=config.batch.micro_batch_rows,
        autocast=config.precision.autocast,
        layout=trainer.layout,
        pipeline=trainer.pipeline,
    )


def _export(trainer: Trainer, data: RunData) -> Path:
    config = trainer.config
    final = config.run.out / FINAL

    def save() -> None:
        model = trainer.model
        if not trainer.layout.is_alone:
            # The checkpoint has the whole weights, of which each rank holds a part.
            model = HybridModel(_with_end_of_text(config.model, data))
            read_weights(list_checkpoints(config.run.out / CHECKPOINTS)[-1], model)
        save_model(model, final, tokenizer=data.tokenizer, overwrite=True)

    try:
        first_for_all(trainer.layout, save)
    except OSError as error:
        raise CheckpointError(
            f"{final} must be writable, got: {error}; all is saved in "
            f"{config.run.out / CHECKPOINTS}: free space and start the run again"
        ) from error
    return final
