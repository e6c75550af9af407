"""A run that goes on from another: its weights and moments, and where its data stood."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from sevenfold.config import ConfigError, StrictModel, parse_config
from sevenfold.data import MixtureLoader
from sevenfold.train.checkpoint import list_checkpoints, read_progress
from sevenfold.train.config import RunConfig, load_run_config
from sevenfold.train.run_data import open_data, training_loader
from sevenfold.train.run_folder import CHECKPOINTS, CONFIG_FILE

STAGE_FILE = "stage.json"


class Start(StrictModel):
    """What a run begins with.

    Args:
        checkpoint: weights, moments and generators.
        step: updates that made them.
        tokens_read: of each source, by name, in all stages before.
    """

    checkpoint: Path
    step: int
    tokens_read: dict[str, int]


def find_start(config: RunConfig) -> Start | None:
    """Return where a run begins; None where it begins anew.

    What the first start found stays in stage.json, whatever becomes of the run before.

    Raises:
        ConfigError: run.start_from is no run with a checkpoint, or one that is not complete.
    """
    file, before = config.run.out / STAGE_FILE, config.run.start_from
    if file.exists():
        return parse_config(Start, json.loads(file.read_text(encoding="utf-8")), str(file))
    if before is None:
        return None
    checkpoints = list_checkpoints(before / CHECKPOINTS)
    if not checkpoints:
        raise ConfigError(f"run.start_from must be a run with a checkpoint, got {before}")
    progress, earlier = read_progress(checkpoints[-1]), load_run_config(before / CONFIG_FILE)
    if progress.step < earlier.run.steps:
        raise ConfigError(
            f"run.start_from must be a run that is complete, got {before}, which has done "
            f"{progress.step} of its {earlier.run.steps} steps; finish it, or end it there with "
            f"--set run.steps={progress.step}"
        )
    tokens = tokens_read(earlier, progress.next_sample)
    return Start(checkpoint=checkpoints[-1], step=progress.step, tokens_read=tokens)


def tokens_read(config: RunConfig, next_sample: int) -> dict[str, int]:
    """Return the tokens of each source that a run and those before it have read by a sample."""
    rows = dict.fromkeys((s.name for s in config.data.all_sources()), next_sample)
    start = find_start(config)
    loader = training_loader(open_data(config), first_rows(config, start))
    if isinstance(loader, MixtureLoader):
        rows = loader.rows_read(next_sample)
    known = {} if start is None else start.tokens_read
    return {**known, **{name: count * config.data.seq_len for name, count in rows.items()}}


def first_rows(config: RunConfig, start: Start | None) -> Mapping[str, int]:
    """Return the rows of each source that come before a run's first, in rows of its own length.

    A source's order is one of pieces of seq_len tokens. Where a stage changes that length, it goes
    on after as many tokens: epochs count on, but of an unfinished one some pieces come again.
    """
    if start is None:
        return {}
    return {
        name: math.ceil(tokens / config.data.seq_len) for name, tokens in start.tokens_read.items()
    }


def write_start(config: RunConfig, start: Start | None) -> None:
    """Keep what a run began with in its folder."""
    file = config.run.out / STAGE_FILE
    if start is not None and not file.exists():
        staging = file.with_name(f".{file.name}.tmp")
        staging.write_text(start.model_dump_json(indent=2) + "\n", encoding="utf-8")
        staging.replace(file)
