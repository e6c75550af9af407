"""Reading each kind of source, and what is wrong with a bad one."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sevenfold.config import DataError
from sevenfold.data import PrepareConfig
from sevenfold.data.plain_text import split_pieces
from sevenfold.data.reading import read_documents
from sevenfold.data.sources import find_sources, hash_source

Configure = Callable[..., PrepareConfig]


def read(config: PrepareConfig) -> list[str]:
    return [document.text for _, document in read_documents(find_sources(config.sources), config)]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    records = [{"text": "one"}, {"text": "zwei ü", "id": 2}, {"text": None}]
    path.write_text("\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def test_jsonl_gives_one_document_a_line(lines: Path, configure: Configure) -> None:
    assert read(configure(sources=(lines,))) == ["one", "zwei ü", ""]


def test_gzipped_jsonl_reads_the_same(lines: Path, configure: Configure) -> None:
    packed = lines.with_name("b.jsonl.gz")
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    assert read(configure(sources=(packed,))) == ["one", "zwei ü", ""]
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz must be an undamaged gzip file"):
        read(configure(sources=(packed,)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl: line 3 must be JSON, got '\{\"text\": \"a\"'"),
        (b'["text"]', r"line 3 must be a JSON object, got"),
        (b'{"body": "a"}', r"line 3 must have the field 'text', got body; set text_field"),
        (b'{"text": 5}', r"line 3: field 'text' must be a string, got int"),
        (b'{"text": "\xff"}', r"line 3: text must be UTF-8, got byte 0xff at byte offset 38"),
        (b'{"text": "a\\ud800"}', r"got lone surrogate U\+D800 at character 1"),
    ],
)
def test_bad_jsonl_line_is_named(
    tmp_path: Path, configure: Configure, line: bytes, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        read(configure(sources=(path,)))


def test_lone_surrogates_and_bad_bytes_can_be_replaced(
    tmp_path: Path, configure: Configure
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b"}\n{"text": "c\xffd"}\n{"text": "\\ud83d\\ude00"}')
    config = configure(sources=(path,), on_bad_utf8="replace")
    assert read(config) == ["a\ufffdb", "c\ufffdd", "😀"]


def test_jsonl_line_above_the_limit_is_named(tmp_path: Path, configure: Configure) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 30}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: a document must be at most max_document_bytes"):
        read(configure(sources=(path,), max_document_bytes=29))
    with pytest.raises(DataError, match=r"line 1 must be at most 24 bytes; raise max_document"):
        read(configure(sources=(path,), max_document_bytes=3))


def test_parquet_gives_one_document_a_row(tmp_path: Path, configure: Configure) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"row {number} ü" for number in range(150)]
    pq.write_table(pa.table({"body": [*texts, None]}), path, row_group_size=40)
    assert read(configure(sources=(path,), text_field="body")) == [*texts, ""]


def test_bad_parquet_is_named(tmp_path: Path, configure: Configure) -> None:
    path = tmp_path / "a.parquet"
    config = configure(sources=(path,))
    pq.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet must have the column 'text', got body"):
        read(config)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match=r"column 'text' must hold strings, got int64"):
        read(config)
    path.write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet must be an undamaged Parquet file"):
        read(config)


def test_damaged_utf8_in_parquet_names_the_row(tmp_path: Path, configure: Configure) -> None:
    path = tmp_path / "a.parquet"
    damaged = pa.array([b"fine", b"ba\xffd"]).view(pa.string())
    pq.write_table(pa.table({"text": damaged}), path)
    with pytest.raises(DataError, match=r"row 2: text must be UTF-8, got byte 0xff at byte off"):
        read(configure(sources=(path,)))


def test_byte_order_mark_is_dropped(tmp_path: Path, configure: Configure) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfhello\r\n")
    assert read(configure(sources=(path,))) == ["hello\r\n"]


@pytest.mark.parametrize(
    ("unit", "ending"), [("one two\n\n", "\n\n"), ("a b\n", "\n"), ("ab ", " "), ("ü", "ü")]
)
def test_split_pieces_join_to_the_file(tmp_path: Path, unit: str, ending: str) -> None:
    path = tmp_path / "a.txt"
    content = (unit * 900)[:1801].encode("utf-8")
    path.write_bytes(content)
    (file,) = find_sources((path,))
    pieces = list(split_pieces(file, 64))
    assert b"".join(piece for _, piece in pieces) == content
    assert [offset for offset, _ in pieces][:2] == [0, len(pieces[0][1])]
    for _, piece in pieces[:-1]:
        assert 64 <= len(piece) <= 128
        assert piece.decode("utf-8").endswith(ending)


def test_a_large_text_file_must_be_split(tmp_path: Path, configure: Configure) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 100, encoding="utf-8")
    with pytest.raises(DataError, match=r"got 100 bytes; set split_documents_bytes"):
        read(configure(sources=(path,), max_document_bytes=99))


def test_folders_are_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.md", "a.txt", ".hidden", ".git/x.txt", "b/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    found = [file.path.relative_to(tmp_path).as_posix() for file in find_sources((tmp_path,))]
    assert found == ["a.txt", "b/1.txt", "b/2.md"]


def test_unusable_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sources must hold at least one file, got"):
        find_sources((tmp_path,))
    with pytest.raises(DataError, match=r"sources must exist, got .*nowhere"):
        find_sources((tmp_path / "nowhere",))
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"sources must name each file once, got .*a\.txt twice"):
        find_sources((tmp_path, tmp_path / "a.txt"))
    (tmp_path / "b.pdf").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.pdf: suffix must be one of \.txt, .*got '\.pdf'"):
        find_sources((tmp_path,))


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    (file,) = find_sources((tmp_path,))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt must be readable, got: No such file"):
        hash_source(file, lambda num_bytes: None)
