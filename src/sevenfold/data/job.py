"""One preparation before its first pass: configuration, files, hashes, given tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from sevenfold.config import ConfigError
from sevenfold.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    SkippedRecord,
    SourceRecord,
    Split,
    SplitRecord,
    fingerprint,
)
from sevenfold.data.prepare_config import PrepareConfig
from sevenfold.data.progress import ProgressCallback, Stage, StageReporter
from sevenfold.data.reading import refuse_options_without_effect
from sevenfold.data.sources import SourceFile, find_sources, hash_source
from sevenfold.data.staging import require_replaceable
from sevenfold.data.survey import Survey
from sevenfold.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    require_byte_level,
    token_type,
    tokenizer_sha256,
    vocabulary_size,
)


@dataclass(frozen=True)
class Job:
    """What a preparation works on.

    Args:
        config: what to do.
        files: the sources.
        hashes: SHA-256 of each source.
        tokenizer: the given tokenizer, or None when one is to be trained.
        fingerprint: equal for two jobs with equal results.
        progress: receives reports.
    """

    config: PrepareConfig
    files: tuple[SourceFile, ...]
    hashes: tuple[str, ...]
    tokenizer: Tokenizer | None
    fingerprint: str
    progress: ProgressCallback | None

    def reporter(self, stage: Stage, total_bytes: int | None) -> StageReporter:
        """Return a counter of the bytes of one stage."""
        return StageReporter(stage, total_bytes, self.progress)


def open_job(config: PrepareConfig, progress: ProgressCallback | None) -> Job:
    """Find and hash the sources, and check what can be checked before reading them.

    Raises:
        ConfigError: an option has no effect on these sources, or `out` lies in a source folder.
        DataError: a source or the tokenizer is missing or of no use, or `out` is no dataset.
    """
    require_replaceable(config.out)
    _refuse_output_among_sources(config)
    files = find_sources(config.sources)
    refuse_options_without_effect(files, config)
    given = None if config.tokenizer is None else _load_given(config.tokenizer, config.end_of_text)
    total = sum(file.num_bytes for file in files)
    advance = StageReporter("hash sources", total, progress).advance
    hashes = tuple(hash_source(file, advance) for file in files)
    contents = [(file.kind, digest) for file, digest in zip(files, hashes, strict=True)]
    mark = fingerprint(config, contents, None if given is None else tokenizer_sha256(given))
    return Job(config, files, hashes, given, mark, progress)


def describe(
    job: Job, survey: Survey, tokenizer: Tokenizer, splits: dict[Split, SplitRecord]
) -> Manifest:
    """Return the manifest of a finished job."""
    config = job.config
    return Manifest(
        version=FORMAT_VERSION,
        fingerprint=job.fingerprint,
        dtype=token_type(tokenizer),
        vocab_size=vocabulary_size(tokenizer),
        end_of_text=config.end_of_text,
        end_of_text_id=end_of_text_id(tokenizer, config.end_of_text, "tokenizer"),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        splits=splits,
        sources=_source_records(job, survey),
        skipped=SkippedRecord(
            empty_files=sum(file.num_bytes == 0 for file in job.files),
            empty_documents=survey.num_empty,
            duplicate_documents=survey.num_duplicates,
            documents_with_replacement_characters=survey.num_with_replacement,
        ),
        config=config.model_dump(mode="json"),
    )


def _source_records(job: Job, survey: Survey) -> tuple[SourceRecord, ...]:
    return tuple(
        SourceRecord(
            path=str(file.path),
            kind=file.kind,
            num_bytes=file.num_bytes,
            sha256=digest,
            num_documents=count,
        )
        for file, digest, count in zip(
            job.files, job.hashes, survey.documents_per_file, strict=True
        )
    )


def _refuse_output_among_sources(config: PrepareConfig) -> None:
    out = config.out.resolve()
    for source in config.sources:
        if out.is_relative_to(source.resolve()):
            raise ConfigError(
                f"out must not lie inside a source, got {config.out} in {source}; "
                f"choose another folder"
            )


def _load_given(path: Path, end_of_text: str) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    require_byte_level(tokenizer, str(path))
    end_of_text_id(tokenizer, end_of_text, str(path))
    # A tokenizer.json may carry the limits of some other use; here no token may be lost or added.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
