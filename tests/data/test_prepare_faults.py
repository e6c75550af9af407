"""Damaged and empty inputs, a full disk, an interrupted run: each has a defined end."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sevenfold.config import DataError
from sevenfold.data import PrepareConfig, PrepareProgress, TokenDataset, prepare
from sevenfold.data.shards import SplitWriter

Configure = Callable[..., PrepareConfig]


def neighbours(config: PrepareConfig) -> list[str]:
    return sorted(path.name for path in config.out.parent.iterdir())


def test_damaged_utf8_names_file_and_byte_offset(corpus: Path, configure: Configure) -> None:
    (corpus / "05.txt").write_bytes("né".encode() + b"\xff rest")
    message = (
        r"05\.txt: text must be UTF-8, got byte 0xff at byte offset 3; repair the file, or set"
    )
    with pytest.raises(DataError, match=message):
        prepare(configure())
    assert neighbours(configure()) == ["corpus"]


def test_damaged_utf8_offset_counts_from_the_start_of_a_split_file(
    corpus: Path, configure: Configure
) -> None:
    text = b"word word.\n\n" * 40
    (corpus / "00.txt").write_bytes(text + b"\xc3(")
    with pytest.raises(DataError, match=rf"got byte 0xc3 at byte offset {len(text)};"):
        prepare(configure(split_documents_bytes=64))


def test_damaged_utf8_can_be_replaced(tmp_path: Path, configure: Configure) -> None:
    source = tmp_path / "bad.txt"
    source.write_bytes(b"good \xff text")
    manifest = prepare(configure(sources=(source,), on_bad_utf8="replace"))
    assert manifest.skipped.documents_with_replacement_characters == 1
    assert manifest.splits["train"].num_bytes == len("good \ufffd text".encode())


def test_empty_files_and_documents_are_counted(corpus: Path, configure: Configure) -> None:
    (corpus / "empty.txt").write_bytes(b"")
    (corpus / "empty.parquet").write_bytes(b"")
    (corpus / "blank.txt").write_bytes(b" \n\n\t")
    manifest = prepare(configure())
    assert manifest.skipped.empty_files == 2
    assert manifest.skipped.empty_documents == 1
    kept = {Path(source.path).name: source.num_documents for source in manifest.sources}
    assert (kept["empty.txt"], kept["blank.txt"], kept["03.txt"]) == (0, 0, 1)
    assert sum(record.num_documents for record in manifest.splits.values()) == 12


def test_nothing_but_empty_input_is_an_error(tmp_path: Path, configure: Configure) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"")
    config = configure(sources=(tmp_path / "a.txt", tmp_path / "b.txt"))
    with pytest.raises(DataError, match=r"sources must hold text, got 2 files with 0 empty"):
        prepare(config)
    assert not config.out.exists()


def test_full_disk_names_path_need_and_remedy(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = SplitWriter.append
    calls = []

    def append_until_full(self: SplitWriter, tokens: list[int]) -> None:
        calls.append(tokens)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, tokens)

    monkeypatch.setattr(SplitWriter, "append", append_until_full)
    config = configure()
    message = (
        rf"{config.out}: the disk must have about [\d,]+ bytes free for the dataset, "
        r"got: No space left on device; free space, or choose a folder on another disk"
    )
    with pytest.raises(DataError, match=message):
        prepare(config)
    assert neighbours(config) == ["corpus"]


def test_full_disk_leaves_the_dataset_that_was_there(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(configure())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sevenfold.data.preparation.save_tokenizer", full)
    config = configure(vocab_size=310, overwrite=True)
    with pytest.raises(DataError, match=r"the disk must have more room free"):
        prepare(config)
    assert TokenDataset.open(config.out).manifest == first
    assert neighbours(config) == ["corpus", "out"]


def test_interrupt_leaves_nothing(configure: Configure) -> None:
    def interrupt(report: PrepareProgress) -> None:
        if report.stage == "encode":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(configure(), interrupt)
    assert neighbours(configure()) == ["corpus"]


def test_output_is_invisible_until_it_is_whole(configure: Configure) -> None:
    config = configure()
    seen: list[bool] = []
    prepare(config, lambda _: seen.append(config.out.exists()))
    assert set(seen) == {False}
    TokenDataset.open(config.out).verify()


def test_a_folder_that_is_no_dataset_is_never_replaced(configure: Configure) -> None:
    config = configure(overwrite=True)
    config.out.mkdir()
    (config.out / "thesis.doc").write_text("precious", encoding="utf-8")
    with pytest.raises(DataError, match=r"out must be a new or empty folder or an earlier dataset"):
        prepare(config)
    assert (config.out / "thesis.doc").read_text(encoding="utf-8") == "precious"


def test_an_empty_output_folder_is_used(configure: Configure) -> None:
    config = configure()
    config.out.mkdir()
    prepare(config)
    assert TokenDataset.open(config.out).num_documents > 0


def test_a_file_in_place_of_the_output_is_refused(configure: Configure) -> None:
    config = configure()
    config.out.write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"out must be a folder, got the file"):
        prepare(config)


def test_output_below_a_file_cannot_be_written(corpus: Path, configure: Configure) -> None:
    config = configure(out=corpus.parent / "file" / "deep" / "out")
    (corpus.parent / "file").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"must be writable, got: Not a directory; choose another"):
        prepare(config)


def test_output_that_appears_meanwhile_is_not_replaced(configure: Configure) -> None:
    config = configure()

    def other_run(report: PrepareProgress) -> None:
        if report.stage == "encode" and not config.out.exists():
            config.out.mkdir()
            (config.out / "theirs").write_text("x", encoding="utf-8")

    with pytest.raises(DataError, match=r"out must be writable, got: Directory not empty"):
        prepare(config, other_run)
    assert neighbours(config) == ["corpus", "out"]


def test_a_source_that_changes_is_noticed(corpus: Path, configure: Configure) -> None:
    def append(report: PrepareProgress) -> None:
        if report.stage == "survey":
            with (corpus / "11.txt").open("a", encoding="utf-8") as stream:
                stream.write("more")

    with pytest.raises(DataError, match=r"11\.txt must not change while it is prepared"):
        prepare(configure(), append)


def test_a_damaged_manifest_is_named(configure: Configure) -> None:
    config = configure()
    prepare(config)
    (config.out / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.json must be a manifest of version 1"):
        prepare(config)
