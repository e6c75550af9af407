"""Reading a prepared dataset, whole and damaged."""

import errno
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from sevenfold.config import DataError
from sevenfold.data import TokenDataset, load_tokenizer


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_shards_hold_the_documents_in_order(prepared: Path) -> None:
    data = TokenDataset.open(prepared)
    shards = data.manifest.splits["train"].shards
    assert len(shards) >= 2
    raw = np.concatenate([np.fromfile(prepared / shard.tokens_file, "<u2") for shard in shards])
    documents = [data.document(number) for number in range(data.num_documents)]
    np.testing.assert_array_equal(np.concatenate(documents), raw)
    assert [len(document) for document in documents] == data.document_lengths().tolist()
    assert data.num_tokens == len(raw)


def test_counts_agree_with_text_and_tokenizer(prepared: Path) -> None:
    data = TokenDataset.open(prepared, "validation")
    tokenizer = load_tokenizer(prepared)
    assert data.vocab_size == tokenizer.get_vocab_size()
    documents = [data.document(number).tolist() for number in range(data.num_documents)]
    text = "".join(tokenizer.decode(document) for document in documents)
    assert data.num_bytes == len(text.encode("utf-8"))
    assert data.token_byte_lengths()[np.concatenate(documents)].sum() == data.num_bytes


def test_pickling_maps_the_files_again(prepared: Path) -> None:
    data = TokenDataset.open(prepared, "validation")
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert again.split == "validation"
    np.testing.assert_array_equal(again.document(0), data.document(0))


def test_a_stretch_is_a_part_of_its_document(prepared: Path) -> None:
    data = TokenDataset.open(prepared)
    whole = data.document(3).tolist()
    assert data.document(3, 2, 5).tolist() == whole[2:5]
    assert data.document(3, 1).tolist() == whole[1:]
    assert data.document(3, 2, 10**9).tolist() == whole[2:]
    assert data.document(3, len(whole), None).tolist() == []


def test_a_shard_that_is_cut_while_it_is_read_is_an_error_that_names_it(copy: Path) -> None:
    data = TokenDataset.open(copy)
    shard = copy / "train-00000.bin"
    os.truncate(shard, shard.stat().st_size // 2)
    last = data.manifest.splits["train"].shards[0].num_documents - 1
    with pytest.raises(
        DataError, match=r"00\.bin must be readable, got its end after \d+ bytes; res"
    ):
        data.document(last)
    assert len(data.document(0)) == data.document_lengths()[0]


def test_a_disk_that_fails_is_an_error_that_names_the_shard(copy: Path, monkeypatch) -> None:
    data = TokenDataset.open(copy)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=r"00\.bin must be readable, got: Input/output error; rest"):
        data.document(0)


def test_documents_are_read_only(prepared: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        TokenDataset.open(prepared).document(0)[0] = 1


@pytest.mark.parametrize("index", [-1, 10_000])
def test_document_number_must_exist(prepared: Path, index: int) -> None:
    with pytest.raises(IndexError, match=rf"index must lie in \[0, \d+\), got {index}"):
        TokenDataset.open(prepared).document(index)


def test_missing_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json must be readable, got: No such file"):
        TokenDataset.open(tmp_path)


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00000.idx.npy", "tokenizer.json"])
def test_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(DataError, match=rf"{name} must exist, got no such file; restore the file"):
        TokenDataset.open(copy)


def test_truncated_shard_is_named(copy: Path) -> None:
    shard = copy / "train-00000.bin"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"00\.bin must have {size} bytes, got {size - 2}; rest"):
        TokenDataset.open(copy)


def test_damaged_index_is_named(copy: Path) -> None:
    index = copy / "train-00000.idx.npy"
    offsets = np.load(index)
    np.save(index, offsets[:-1])
    with pytest.raises(DataError, match=rf"idx\.npy must hold {len(offsets)} offsets that end"):
        TokenDataset.open(copy)
    index.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"idx\.npy must be a NumPy array, got"):
        TokenDataset.open(copy)


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00000.idx.npy", "tokenizer.json"])
def test_verify_finds_one_changed_byte(copy: Path, name: str) -> None:
    data = TokenDataset.open(copy)
    data.verify()
    content = bytearray((copy / name).read_bytes())
    content[-3] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} must have SHA-256 [0-9a-f]{{64}}, got"):
        data.verify()
