"""A run that goes on from another: its weights and moments, and where its data stood."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import Field

from sevenfold.config import ConfigError, StrictModel, parse_config
from sevenfold.data import MixtureLoader
from sevenfold.train.checkpoint import list_checkpoints, read_progress
from sevenfold.train.config import RunConfig, load_run_config
from sevenfold.train.run_data import open_data, training_loader
from sevenfold.train.run_folder import CHECKPOINTS, CONFIG_FILE

STAGE_FILE = "stage.json"


class Documents(StrictModel):
    """The documents of a source: of a dataset those from min_tokens to below max_tokens."""

    fingerprint: str
    min_tokens: int
    max_tokens: int | None

    @property
    def end_tokens(self) -> float:
        """max_tokens; infinite without one."""
        return math.inf if self.max_tokens is None else self.max_tokens

    def have(self, others: "Documents") -> bool:
        """Whether all of another source's documents are among them."""
        same = self.fingerprint == others.fingerprint
        return (
            same and self.min_tokens <= others.min_tokens and others.end_tokens <= self.end_tokens
        )

    def num_tokens(self, lengths: np.ndarray) -> int:
        """Return their tokens; lengths are those of all the dataset's documents."""
        inside = (lengths >= self.min_tokens) & (lengths < self.end_tokens)
        return int(lengths[inside].sum())


class Start(StrictModel):
    """What a run begins with.

    Args:
        checkpoint: weights, moments and generators.
        step: updates that made them.
        tokens_read: of each source, by name, in all stages before; of one that is a part of an
            earlier one, its share of what was read of that.
        documents: of each source of the stages before, by name.
    """

    checkpoint: Path
    step: int
    tokens_read: dict[str, int]
    documents: dict[str, Documents] = Field(default_factory=dict)


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
    start = find_start(earlier)
    documents = {**({} if start is None else start.documents), **_documents(earlier)}
    tokens = _tokens_read(earlier, start, progress.next_sample)
    return Start(
        checkpoint=checkpoints[-1],
        step=progress.step,
        tokens_read={**tokens, **_read_of_parts(config, tokens, documents)},
        documents=documents,
    )


def _tokens_read(config: RunConfig, start: Start | None, next_sample: int) -> dict[str, int]:
    """The tokens of each source that a run and those before it have read by a sample."""
    rows = dict.fromkeys((s.name for s in config.data.all_sources()), next_sample)
    loader = training_loader(open_data(config), first_rows(config, start))
    if isinstance(loader, MixtureLoader):
        rows = loader.rows_read(next_sample)
    known = {} if start is None else start.tokens_read
    return {**known, **{name: count * config.data.seq_len for name, count in rows.items()}}


def _documents(config: RunConfig) -> dict[str, Documents]:
    datasets = open_data(config).datasets
    return {
        s.name: Documents(
            fingerprint=datasets[s.name].manifest.fingerprint,
            min_tokens=s.min_tokens,
            max_tokens=s.max_tokens,
        )
        for s in config.data.all_sources()
    }


def _read_of_parts(
    config: RunConfig, tokens: Mapping[str, int], earlier: Mapping[str, Documents]
) -> dict[str, int]:
    """What was read of new sources that are parts of earlier ones, by their shares of the tokens.

    An earlier order of pieces mixes all lengths, so that only their number can be known.
    """
    found, datasets = {}, open_data(config).datasets
    for name, own in _documents(config).items():
        wholes = [n for n, documents in earlier.items() if n in tokens and documents.have(own)]
        if name in tokens or not wholes:
            continue
        # The narrowest: what wider ones have read of it is counted in it already.
        whole = min(wholes, key=lambda n: earlier[n].end_tokens - earlier[n].min_tokens)
        lengths = datasets[name].document_lengths()
        share = own.num_tokens(lengths) / earlier[whole].num_tokens(lengths)
        found[name] = round(tokens[whole] * share)
    return found


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
