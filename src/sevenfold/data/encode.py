"""The last pass: documents to tokens to shards."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from sevenfold.data.documents import Document
from sevenfold.data.manifest import Split
from sevenfold.data.segments import cut_segments
from sevenfold.data.shards import SplitWriter


@dataclass(frozen=True)
class _Segment:
    """A part of a document; document_bytes is given with the last part."""

    text: str
    split: Split
    document_bytes: int | None


@dataclass(frozen=True)
class Encoder:
    """Tokenizes documents in batches and appends them to their split.

    Args:
        tokenizer: turns text into ids; special tokens spelt out in a text stay ordinary text.
        end_of_text_id: appended to each document.
        writers: one for each split.
        validation_limit: documents with a split key below this go to "validation".
        batch_bytes: characters handed to the tokenizer at once.
    """

    tokenizer: Tokenizer
    end_of_text_id: int
    writers: dict[Split, SplitWriter]
    validation_limit: int
    batch_bytes: int

    def encode(self, documents: Iterable[Document], advance: Callable[[int], None]) -> None:
        """Tokenize and write documents in order.

        Args:
            documents: non-empty documents.
            advance: called with the bytes of each document written.
        """
        self.tokenizer.encode_special_tokens = True  # the text of a document is not a command
        for batch in self._batches(documents):
            # The fast variant leaves out offsets, which nothing here needs.
            texts = [segment.text for segment in batch]
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for segment, encoding in zip(batch, encodings, strict=True):
                self._write(segment, encoding.ids, advance)

    def _write(self, segment: _Segment, ids: list[int], advance: Callable[[int], None]) -> None:
        writer = self.writers[segment.split]
        writer.append(ids)
        if segment.document_bytes is not None:
            writer.append([self.end_of_text_id])
            writer.end_document(segment.document_bytes)
            advance(segment.document_bytes)

    def _batches(self, documents: Iterable[Document]) -> Iterator[list[_Segment]]:
        batch: list[_Segment] = []
        size = 0
        for segment in self._segments(documents):
            batch.append(segment)
            size += len(segment.text)
            if size >= self.batch_bytes:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _segments(self, documents: Iterable[Document]) -> Iterator[_Segment]:
        for document in documents:
            held_out = document.split_key() < self.validation_limit
            split: Split = "validation" if held_out else "train"
            *first, last = cut_segments(document.text)
            for text in first:
                yield _Segment(text, split, None)
            yield _Segment(last, split, len(document.utf8))
