"""Small corpora and prepared datasets for the data tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sevenfold.data import PrepareConfig, prepare

WORDS = (
    *("the", "of", "and", "to", "a", "in", "was", "her", "she", "it", "had", "not", "be", "as"),
    *("he", "with", "for", "but", "at", "you"),
)

Configure = Callable[..., PrepareConfig]


def make_sentence(number: int, words: int = 40) -> str:
    """A text that differs for every number."""
    chosen = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(words)]
    return f"Chapter {number}. " + " ".join(chosen) + f" – naïve café {number * 31}.\n"


@pytest.fixture
def sentence() -> Callable[[int], str]:
    """A maker of texts that differ for every number."""
    return make_sentence


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of twelve text files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(make_sentence(number), encoding="utf-8")
    return folder


@pytest.fixture
def configure(corpus: Path, tmp_path: Path) -> Configure:
    """A maker of configurations: the corpus into tmp_path/out, but for what is given."""

    def make(**changes: object) -> PrepareConfig:
        values = {"sources": (corpus,), "out": tmp_path / "out", "vocab_size": 300} | changes
        return PrepareConfig(**values)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of forty documents in several shards."""
    root = tmp_path_factory.mktemp("prepared")
    source = root / "all.txt"
    source.write_text(
        "\n\n".join(make_sentence(n, 20 + 9 * n) for n in range(40)), encoding="utf-8"
    )
    prepare(
        PrepareConfig(
            sources=(source,),
            out=root / "out",
            vocab_size=320,
            split_documents_bytes=256,
            validation_fraction=0.2,
            tokens_per_shard=2000,
        )
    )
    return root / "out"
