"""A tiny prepared dataset, and the tables of a run on it."""

from pathlib import Path

import pytest
import torch
from train_helpers import run_table

from sevenfold.data import PrepareConfig, prepare

WORDS = "the river held its colour while nine grey herons stood quite still beside old stones"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Models of 16 channels only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of different lengths."""
    folder = tmp_path_factory.mktemp("data")
    words = WORDS.split()
    source = folder / "text"
    source.mkdir()
    for i in range(60):
        picked = (words[(i * j + i) % len(words)] for j in range(5 + 7 * (i % 9)))
        (source / f"{i:02}.txt").write_text(" ".join(picked) + f" {i}.", encoding="utf-8")
    out = folder / "tokens"
    prepare(PrepareConfig(sources=(source,), out=out, vocab_size=300, validation_fraction=0.2))
    return out


@pytest.fixture
def run_values(data_path: Path, tmp_path: Path) -> dict:
    """The tables of a run of 8 steps of 3 rows."""
    return run_table(data_path, tmp_path / "run")
