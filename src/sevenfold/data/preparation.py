"""`sevenfold data prepare`: text in, tokenizer and token shards out."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from sevenfold.config import DataError
from sevenfold.data.dataset import check_files
from sevenfold.data.encode import Encoder
from sevenfold.data.job import Job, describe, open_job
from sevenfold.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    Split,
    SplitRecord,
    read_manifest,
    write_manifest,
)
from sevenfold.data.prepare_config import PrepareConfig
from sevenfold.data.progress import PrepareProgress, ProgressCallback
from sevenfold.data.shards import SplitWriter
from sevenfold.data.sources import require_unchanged
from sevenfold.data.staging import staged_folder, writing
from sevenfold.data.survey import Survey, kept_documents, survey_documents
from sevenfold.data.tokenizer import (
    end_of_text_id,
    sample_texts,
    save_tokenizer,
    token_type,
    train_tokenizer,
)


def prepare(config: PrepareConfig, progress: ProgressCallback | None = None) -> Manifest:
    """Turn text into a tokenizer and memory-mapped token shards.

    Reads the sources up to four times (hashes, survey, tokenizer, tokens) with memory bounded by
    config.batch_bytes, config.max_document_bytes and one byte per document. The output appears
    all at once. Documents go to "validation" by a hash of their content, whatever their order;
    with two different documents and a fraction above 0 neither split is empty.

    Args:
        config: what to do.
        progress: receives reports; a dataset that is already there is one report of its own.

    Returns:
        The manifest of the dataset in config.out.

    Raises:
        ConfigError: an option has no effect on these sources, or `out` lies in a source folder.
        DataError: a source is missing, damaged or empty; the disk is full; or `out` holds
            another dataset and config.overwrite is false.
        UnsupportedError: dedup is "minhash" and datasketch is not installed.
    """
    job = open_job(config, progress)
    if (config.out / MANIFEST_FILE).is_file() and not config.overwrite:
        return _already_prepared(job)
    survey = survey_documents(job.files, config, job.reporter("survey", None).advance)
    with staged_folder(config.out, overwrite=config.overwrite) as staging:
        tokenizer = job.tokenizer or _train(job, survey)
        splits = _encode(job, survey, tokenizer, staging)
        for file in job.files:
            require_unchanged(file)
        manifest = describe(job, survey, tokenizer, splits)
        with writing(config.out):
            save_tokenizer(tokenizer, staging)
            write_manifest(manifest, staging)
    return manifest


def _already_prepared(job: Job) -> Manifest:
    out = job.config.out
    manifest = read_manifest(out)
    if manifest.fingerprint != job.fingerprint:
        raise DataError(
            f"{out} must be prepared from these sources with these options, got a dataset "
            f"with other ones; choose another folder, or set overwrite = true"
        )
    check_files(out, manifest)
    if job.progress is not None:
        total = sum(record.num_bytes for record in manifest.splits.values())
        job.progress(PrepareProgress("already prepared", total, total))
    return manifest


def _train(job: Job, survey: Survey) -> Tokenizer:
    sample = sample_texts(
        _training_texts(job, survey),
        total_bytes=survey.num_bytes,
        cap_bytes=job.config.tokenizer_sample_bytes,
    )
    return train_tokenizer(
        sample, vocab_size=job.config.vocab_size, end_of_text=job.config.end_of_text
    )


def _training_texts(job: Job, survey: Survey) -> Iterator[str]:
    reporter = job.reporter("train tokenizer", survey.num_bytes)
    for document in kept_documents(job.files, job.config, survey):
        reporter.advance(len(document.utf8))
        # Held-out text must not shape the vocabulary.
        if document.split_key() >= survey.validation_limit:
            yield document.text


def _encode(
    job: Job, survey: Survey, tokenizer: Tokenizer, folder: Path
) -> dict[Split, SplitRecord]:
    config = job.config
    reporter = job.reporter("encode", survey.num_bytes)
    train = _writer(folder, "train", tokenizer, config)
    held_out = _writer(folder, "validation", tokenizer, config)

    def need_bytes() -> int | None:
        written = train.written_bytes + held_out.written_bytes
        done = reporter.done_bytes
        return written * survey.num_bytes // done if done else None

    with train, held_out, writing(config.out, need_bytes):
        encoder = Encoder(
            tokenizer=tokenizer,
            end_of_text_id=end_of_text_id(tokenizer, config.end_of_text, "tokenizer"),
            writers={"train": train, "validation": held_out},
            validation_limit=survey.validation_limit,
            batch_bytes=config.batch_bytes,
        )
        encoder.encode(kept_documents(job.files, config, survey), reporter.advance)
        return {"train": train.finish(), "validation": held_out.finish()}


def _writer(folder: Path, split: Split, tokenizer: Tokenizer, config: PrepareConfig) -> SplitWriter:
    return SplitWriter(
        folder,
        split,
        dtype=token_type(tokenizer),
        tokens_per_shard=config.tokens_per_shard,
    )
