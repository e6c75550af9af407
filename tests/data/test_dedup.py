"""Which documents count as repetitions."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sevenfold.config import UnsupportedError
from sevenfold.data import PrepareConfig, prepare
from sevenfold.data import minhash as minhash_module
from sevenfold.data.dedup import ExactDuplicates

Configure = Callable[..., PrepareConfig]


def test_exact_folds_whitespace_and_composition_but_not_case() -> None:
    repeats = ExactDuplicates()
    texts = ["One  two\n", "One two", "one two", "caf\u00e9", "cafe\u0301", "cafe"]
    assert [repeats.is_duplicate(text) for text in texts] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]


def test_exact_duplicates_are_dropped_and_counted(corpus: Path, configure: Configure) -> None:
    again = (corpus / "03.txt").read_text(encoding="utf-8").replace(" ", "  ")
    (corpus / "99.txt").write_text(again, encoding="utf-8")
    manifest = prepare(configure(dedup="exact"))
    assert manifest.skipped.duplicate_documents == 1
    assert manifest.sources[-1].num_documents == 0
    assert sum(record.num_documents for record in manifest.splits.values()) == 12


def test_without_dedup_a_repetition_is_kept_in_the_same_split(
    corpus: Path, configure: Configure
) -> None:
    (corpus / "99.txt").write_bytes((corpus / "03.txt").read_bytes())
    manifest = prepare(configure())
    assert manifest.skipped.duplicate_documents == 0
    assert sum(record.num_documents for record in manifest.splits.values()) == 13


def test_minhash_finds_near_duplicates_only() -> None:
    pytest.importorskip("datasketch")
    repeats = minhash_module.NearDuplicates(0.7)
    text = " ".join(f"word{number}" for number in range(200))
    other = " ".join(f"term{number}" for number in range(200))
    half = " ".join(f"word{number}" for number in range(90)) + " " + other
    near = text.replace("word100 ", "changed ").upper()
    verdicts = [repeats.is_duplicate(text) for text in (text, other, half, near, text + "!")]
    assert verdicts == [False, False, False, True, True]


def test_minhash_tells_very_short_texts_apart() -> None:
    pytest.importorskip("datasketch")
    repeats = minhash_module.NearDuplicates(0.9)
    texts = ["a b", "a c", "!!", "??", "A, b", "??"]
    assert [repeats.is_duplicate(text) for text in texts] == [False] * 4 + [True] * 2


def test_minhash_drops_near_duplicates_and_counts_them(corpus: Path, configure: Configure) -> None:
    pytest.importorskip("datasketch")
    near = (corpus / "03.txt").read_text(encoding="utf-8") + " An afterthought."
    (corpus / "99.txt").write_text(near, encoding="utf-8")
    manifest = prepare(configure(dedup="minhash", minhash_threshold=0.85))
    assert manifest.skipped.duplicate_documents == 1
    assert manifest.sources[-1].num_documents == 0


def test_missing_datasketch_names_the_remedy(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(minhash_module, "import_module", missing)
    config = configure(dedup="minhash")
    with pytest.raises(UnsupportedError, match=r"pip install sevenfold\[dedup\]"):
        prepare(config)
    assert not config.out.exists()
