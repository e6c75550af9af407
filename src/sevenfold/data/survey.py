"""The first pass over the documents: what is kept, how large it is, and how it splits."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

from sevenfold.config import DataError
from sevenfold.data.dedup import make_deduplicator
from sevenfold.data.documents import Document
from sevenfold.data.prepare_config import PrepareConfig
from sevenfold.data.reading import read_documents
from sevenfold.data.sources import SourceFile

_KEYS = 2**64
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Survey:
    """What the first pass found.

    Args:
        kept: one byte per document in order, 1 for a document that is kept.
        num_documents: documents kept.
        num_bytes: their UTF-8 bytes.
        num_empty: documents of nothing but whitespace, dropped.
        num_duplicates: documents dropped as repetitions.
        num_with_replacement: documents kept that hold U+FFFD.
        documents_per_file: documents kept of each file.
        validation_limit: a document is held out when its split key is below this.
    """

    kept: bytes
    num_documents: int
    num_bytes: int
    num_empty: int
    num_duplicates: int
    num_with_replacement: int
    documents_per_file: tuple[int, ...]
    validation_limit: int


def survey_documents(
    files: Sequence[SourceFile], config: PrepareConfig, advance: Callable[[int], None]
) -> Survey:
    """Read every document once and decide which are kept.

    Memory: one byte per document, and what the de-duplication states.

    Args:
        files: the sources.
        config: the preparation.
        advance: called with the bytes of each document.

    Raises:
        DataError: a source cannot be read, or nothing but empty documents is left.
    """
    surveyor = _Surveyor(config)
    for number, document in read_documents(files, config):
        advance(len(document.utf8))
        surveyor.add(number, document)
    if not surveyor.counts["kept"]:
        empty = surveyor.counts["empty"]
        raise DataError(
            f"sources must hold text, got {len(files)} files with {empty} empty documents; "
            f"name files that hold text"
        )
    return surveyor.result(len(files))


def kept_documents(
    files: Sequence[SourceFile], config: PrepareConfig, survey: Survey
) -> Iterator[Document]:
    """Yield again, in order, the documents that a survey kept."""
    documents: Iterable[Document] = (document for _, document in read_documents(files, config))
    return compress(documents, survey.kept)


class _Surveyor:
    """The running counts of a survey."""

    def __init__(self, config: PrepareConfig) -> None:
        self.counts: Counter[str] = Counter()
        self._fraction = config.validation_fraction
        self._repeats = make_deduplicator(config)
        self._per_file: Counter[int] = Counter()
        self._keys = _KeyRange()
        self._kept = bytearray()

    def add(self, number: int, document: Document) -> None:
        verdict = self._judge(document)
        self.counts[verdict] += 1
        self._kept.append(verdict == "kept")
        if verdict == "kept":
            self._per_file[number] += 1
            self.counts["bytes"] += len(document.utf8)
            self.counts["replacement"] += _REPLACEMENT in document.text
            self._keys.add(document.split_key())

    def result(self, num_files: int) -> Survey:
        return Survey(
            kept=bytes(self._kept),
            num_documents=self.counts["kept"],
            num_bytes=self.counts["bytes"],
            num_empty=self.counts["empty"],
            num_duplicates=self.counts["duplicate"],
            num_with_replacement=self.counts["replacement"],
            documents_per_file=tuple(self._per_file[number] for number in range(num_files)),
            validation_limit=self._keys.limit(self._fraction),
        )

    def _judge(self, document: Document) -> str:
        if document.is_empty():
            return "empty"
        if self._repeats is not None and self._repeats.is_duplicate(document.text):
            return "duplicate"
        return "kept"


class _KeyRange:
    """The smallest and largest split key."""

    def __init__(self) -> None:
        self.smallest = _KEYS
        self.largest = 0

    def add(self, key: int) -> None:
        self.smallest = min(self.smallest, key)
        self.largest = max(self.largest, key)

    def limit(self, fraction: float) -> int:
        """Return the key limit, moved just so far that no side stays empty."""
        if fraction == 0.0 or self.smallest >= self.largest:
            return 0
        return min(max(int(fraction * _KEYS), self.smallest + 1), self.largest)
