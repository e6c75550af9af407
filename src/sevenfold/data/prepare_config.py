"""What `sevenfold data prepare` can be asked to do."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from sevenfold.config import StrictModel

KIB = 1024
MIB = 1024 * KIB


class PrepareConfig(StrictModel):
    """The configuration of one preparation: text in, tokenizer and token shards out.

    Args:
        sources: files (.txt, .md, .jsonl, .jsonl.gz, .parquet) and folders of such files.
        out: the folder to create.
        overwrite: replace a dataset that is already in `out`.
        tokenizer: a byte-level `tokenizer.json` (or its folder) to use instead of training one.
        vocab_size: most tokens that a trained tokenizer may have, at least 257.
        tokenizer_sample_bytes: most text that the tokenizer is trained on, spread over all sources.
        end_of_text: the special token appended to each document.
        text_field: field (JSONL) or column (Parquet) that holds the text.
        split_documents_bytes: cut plain-text files at paragraph ends into documents of about this
            size; None keeps one document a file.
        max_document_bytes: largest document accepted; one document is held in memory at a time.
        on_bad_utf8: "error" names file and byte offset, "replace" puts U+FFFD and goes on.
        dedup: drop documents that repeat an earlier one: "exact" after folding whitespace,
            "minhash" also near-duplicates (needs `pip install sevenfold[dedup]`).
        minhash_threshold: estimated Jaccard similarity of word 5-grams from which two documents
            are near-duplicates.
        validation_fraction: share of the documents held out, chosen by a hash of their content.
        tokens_per_shard: a shard is closed by the document that brings it to this many tokens.
        batch_bytes: text handed to the tokenizer at once; peak memory grows with it (about 30 x).
    """

    sources: tuple[Path, ...] = Field(min_length=1)
    out: Path
    overwrite: bool = False
    tokenizer: Path | None = None
    vocab_size: int = Field(default=8192, ge=257)
    tokenizer_sample_bytes: int = Field(default=256 * MIB, ge=1)
    end_of_text: str = Field(default="<|endoftext|>", min_length=1)
    text_field: str = Field(default="text", min_length=1)
    split_documents_bytes: int | None = Field(default=None, ge=64)
    max_document_bytes: int = Field(default=64 * MIB, ge=1)
    on_bad_utf8: Literal["error", "replace"] = "error"
    dedup: Literal["exact", "minhash"] | None = None
    minhash_threshold: float = Field(default=0.8, gt=0.0, le=1.0)
    validation_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    tokens_per_shard: int = Field(default=2**27, ge=1)
    batch_bytes: int = Field(default=4 * MIB, ge=1)

    @model_validator(mode="after")
    def _refuse_options_without_effect(self) -> Self:
        if self.tokenizer is not None:
            self._require_default("vocab_size", "tokenizer is given")
            self._require_default("tokenizer_sample_bytes", "tokenizer is given")
        if self.dedup != "minhash":
            self._require_default("minhash_threshold", 'dedup is not "minhash"')
        return self

    @model_validator(mode="after")
    def _split_below_maximum(self) -> Self:
        split = self.split_documents_bytes
        if split is not None and 2 * split > self.max_document_bytes:
            raise ValueError(
                f"split_documents_bytes must be at most half of max_document_bytes "
                f"({self.max_document_bytes}), got {split}"
            )
        return self

    def _require_default(self, name: str, reason: str) -> None:
        default = type(self).model_fields[name].default
        value = getattr(self, name)
        if value != default:
            raise ValueError(f"{name} must not be set when {reason}, got {value}; remove it")
