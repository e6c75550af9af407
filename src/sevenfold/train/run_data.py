"""The data of a run: its sources opened, and the loader over them."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sevenfold.config import ConfigError
from sevenfold.data import LengthSlice, MixtureLoader, MixtureSource, PackedLoader, TokenDataset
from sevenfold.train.batch import SampleSource
from sevenfold.train.config import RunConfig
from sevenfold.train.data_config import SourceSection


@dataclass(frozen=True)
class RunData:
    """Sources that share one tokenizer, opened.

    Args:
        config: the run.
        datasets: the training split of each source, by name.
    """

    config: RunConfig
    datasets: Mapping[str, TokenDataset]

    @property
    def tokenizer(self) -> Path:
        """Folder that has the tokenizer."""
        return self._first.path

    @property
    def end_of_text_id(self) -> int:
        """The token that ends a document."""
        return self._first.end_of_text_id

    @property
    def fingerprint(self) -> str:
        """What tells other data apart."""
        found = [data.manifest.fingerprint for data in self.datasets.values()]
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

    @property
    def _first(self) -> TokenDataset:
        return next(iter(self.datasets.values()))


def open_data(config: RunConfig) -> RunData:
    """Open every source of a run.

    Raises:
        ConfigError: the vocabulary does not fit the model, or tokenizers differ.
        DataError: a dataset cannot be read.
    """
    datasets = {s.name: TokenDataset.open(s.path, "train") for s in config.data.all_sources()}
    tokenizers = {name: data.manifest.tokenizer_sha256 for name, data in datasets.items()}
    if len(set(tokenizers.values())) > 1:
        raise ConfigError(
            f"data.sources must share one tokenizer, got several in {', '.join(tokenizers)}; "
            f"prepare them with `sevenfold data prepare --tokenizer`"
        )
    data = RunData(config, datasets)
    vocab_size = data._first.vocab_size
    if vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size must be at least the {vocab_size} of {data.tokenizer}, "
            f"got {config.model.vocab_size}"
        )
    return data


def training_loader(data: RunData, first_rows: Mapping[str, int]) -> SampleSource:
    """Return the rows that a run trains on.

    Args:
        data: opened.
        first_rows: rows of each source that an earlier stage has read.

    Raises:
        ConfigError: the run would read a source more often than its max_epochs.
    """
    config, seed = data.config, data.config.run.seed
    section = config.data
    loaders = {
        s.name: _packed(s, data.datasets[s.name], section.seq_len, seed=seed)
        for s in section.all_sources()
    }
    if section.path is not None and not any(first_rows.values()):
        [(name, loader)] = loaders.items()
        _check_epochs(config, loaders, {name: config.total_rows()})
        return loader
    mixture = _mixture(config, loaders, first_rows)
    _check_epochs(config, loaders, mixture.rows_read(config.total_rows()))
    return mixture


def validation_loader(config: RunConfig) -> tuple[SampleSource, int]:
    """Return the rows of the validation splits, at the last weights, and how many there are.

    Few documents are held out: a source takes part if one of them has its length.

    Raises:
        DataError: none has, or a split cannot be read.
    """
    weighed = [s for s in config.data.all_sources() if s.begin_share == 0 and _end_of(s) > 0]
    datasets = {s.name: TokenDataset.open(s.path, "validation") for s in weighed}
    sources = [s for s in weighed if _has_documents(s, datasets[s.name])] or weighed
    loaders = {
        s.name: _packed(s, datasets[s.name], config.data.seq_len, seed=None) for s in sources
    }
    num_rows = sum(loader.num_samples_per_epoch() for loader in loaders.values())
    if len(sources) == 1:
        return loaders[sources[0].name], num_rows
    last = [MixtureSource(s.name, loaders[s.name], _end_of(s), _end_of(s)) for s in sources]
    return MixtureLoader(last, seed=0, num_rows=num_rows, block_rows=len(last)), num_rows


def _mixture(
    config: RunConfig, loaders: Mapping[str, PackedLoader], first_rows: Mapping[str, int]
) -> MixtureLoader:
    section = config.data
    sources = [
        MixtureSource(
            s.name,
            loaders[s.name],
            s.weight,
            _end_of(s),
            s.begin_share,
            first_rows.get(s.name, 0),
        )
        for s in section.all_sources()
    ]
    return MixtureLoader(
        sources,
        seed=config.run.seed,
        num_rows=max(1, (section.mixture_tokens or 1) // section.seq_len),
        transition=section.transition_share or 1.0,
    )


def _end_of(source: SourceSection) -> float:
    return source.weight if source.end_weight is None else source.end_weight


def _has_documents(source: SourceSection, dataset: TokenDataset) -> bool:
    lengths = dataset.document_lengths()
    above = lengths >= source.min_tokens
    return bool((above & (lengths < (source.max_tokens or math.inf))).any())


def _packed(
    source: SourceSection, dataset: TokenDataset, seq_len: int, *, seed: int | None
) -> PackedLoader:
    """The rows of one source; without a seed in their stored order."""
    documents = dataset
    if source.min_tokens > 1 or source.max_tokens is not None:
        documents = LengthSlice(
            dataset,
            name=source.name,
            min_tokens=source.min_tokens,
            max_tokens=source.max_tokens,
        )
    return PackedLoader(documents, seq_len=seq_len, seed=seed or 0, shuffle=seed is not None)


def _check_epochs(
    config: RunConfig, loaders: Mapping[str, PackedLoader], rows: Mapping[str, int]
) -> None:
    for source in config.data.all_sources():
        epochs = rows[source.name] / loaders[source.name].num_samples_per_epoch()
        if source.max_epochs is not None and epochs > source.max_epochs:
            raise ConfigError(
                f"max_epochs of {source.name!r} must allow the {epochs:.2f} epochs that the run "
                f"reads, got {source.max_epochs:g}; take fewer steps, a lower weight or more text"
            )
