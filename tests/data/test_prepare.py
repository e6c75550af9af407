"""The whole preparation: what comes out, and what a second run does."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sevenfold.config import ConfigError, DataError, parse_config
from sevenfold.data import (
    PrepareConfig,
    PrepareProgress,
    TokenDataset,
    load_tokenizer,
    prepare,
)

Configure = Callable[..., PrepareConfig]


def texts_of(path: Path) -> dict[str, set[str]]:
    tokenizer = load_tokenizer(path)
    texts: dict[str, set[str]] = {}
    for split in ("train", "validation"):
        data = TokenDataset.open(path, split)
        documents = (data.document(number)[:-1] for number in range(data.num_documents))
        texts[split] = {tokenizer.decode(document.tolist()) for document in documents}
    return texts


def test_every_document_comes_back_byte_for_byte(corpus: Path, configure: Configure) -> None:
    config = configure(validation_fraction=0.3)
    manifest = prepare(config)

    originals = {file.read_text(encoding="utf-8") for file in corpus.iterdir()}
    texts = texts_of(config.out)
    assert texts["train"] | texts["validation"] == originals
    assert not texts["train"] & texts["validation"]
    for split, record in manifest.splits.items():
        assert record.num_documents == len(texts[split])
        assert record.num_bytes == sum(len(text.encode("utf-8")) for text in texts[split])


def test_every_document_ends_with_the_end_of_text_token(configure: Configure) -> None:
    config = configure()
    manifest = prepare(config)
    data = TokenDataset.open(config.out)
    for number in range(data.num_documents):
        document = data.document(number)
        assert document[-1] == manifest.end_of_text_id
        assert manifest.end_of_text_id not in document[:-1]


def test_end_of_text_spelt_in_a_document_stays_text(tmp_path: Path, configure: Configure) -> None:
    source = tmp_path / "sly.txt"
    source.write_text("one <|endoftext|> two", encoding="utf-8")
    config = configure(sources=(source,))
    manifest = prepare(config)
    document = TokenDataset.open(config.out).document(0).tolist()
    assert document.count(manifest.end_of_text_id) == 1
    tokens = load_tokenizer(config.out).decode(document, skip_special_tokens=False)
    assert tokens == "one <|endoftext|> two<|endoftext|>"


def test_manifest_names_sources_and_shards_with_hashes(corpus: Path, configure: Configure) -> None:
    config = configure()
    prepare(config)
    manifest = json.loads((config.out / "manifest.json").read_text(encoding="utf-8"))
    first = corpus / "00.txt"
    assert manifest["sources"][0] == {
        "path": str(first),
        "kind": "text",
        "num_bytes": first.stat().st_size,
        "sha256": hashlib.sha256(first.read_bytes()).hexdigest(),
        "num_documents": 1,
    }
    shard = manifest["splits"]["train"]["shards"][0]
    content = (config.out / shard["tokens_file"]).read_bytes()
    assert shard["tokens_sha256"] == hashlib.sha256(content).hexdigest()
    assert len(content) == 2 * manifest["splits"]["train"]["num_tokens"]
    assert manifest["dtype"] == "uint16"
    assert manifest["config"]["validation_fraction"] == 0.05


def test_the_split_does_not_depend_on_the_order(corpus: Path, configure: Configure) -> None:
    files = sorted(corpus.iterdir())
    forward = configure(sources=tuple(files), out=corpus.parent / "a", validation_fraction=0.4)
    backward = forward.model_copy(
        update={"sources": tuple(files[::-1]), "out": corpus.parent / "b"}
    )
    prepare(forward)
    prepare(backward)
    assert texts_of(forward.out) == texts_of(backward.out)


@pytest.mark.parametrize("fraction", [1e-9, 0.999999999])
def test_no_split_is_empty(configure: Configure, fraction: float) -> None:
    splits = prepare(configure(validation_fraction=fraction)).splits
    assert {split: record.num_documents for split, record in splits.items()} in (
        {"train": 11, "validation": 1},
        {"train": 1, "validation": 11},
    )


def test_fraction_zero_holds_nothing_out(configure: Configure) -> None:
    config = configure(validation_fraction=0.0)
    assert prepare(config).splits["validation"].num_documents == 0
    with pytest.raises(DataError, match=r"split 'validation' must hold a document, got none"):
        TokenDataset.open(config.out, "validation")


def test_second_run_returns_at_once(configure: Configure) -> None:
    config = configure()
    first = prepare(config)
    written = (config.out / "manifest.json").stat().st_mtime_ns
    reports: list[PrepareProgress] = []
    assert prepare(config, reports.append) == first
    assert [report.stage for report in reports][-1] == "already prepared"
    assert "survey" not in {report.stage for report in reports}
    assert (config.out / "manifest.json").stat().st_mtime_ns == written


def test_second_run_with_other_options_is_refused(configure: Configure) -> None:
    prepare(configure())
    with pytest.raises(DataError, match=r"choose another folder, or set overwrite = true"):
        prepare(configure(vocab_size=310))


def test_second_run_with_other_text_is_refused(corpus: Path, configure: Configure) -> None:
    prepare(configure())
    (corpus / "00.txt").write_text("something else", encoding="utf-8")
    with pytest.raises(DataError, match=r"must be prepared from these sources with these options"):
        prepare(configure())


def test_overwrite_replaces_the_dataset_and_leaves_nothing(configure: Configure) -> None:
    prepare(configure())
    config = configure(vocab_size=310, overwrite=True)
    assert prepare(config).vocab_size == 310
    assert TokenDataset.open(config.out).vocab_size == 310
    assert sorted(path.name for path in config.out.parent.iterdir()) == ["corpus", "out"]


def test_a_given_tokenizer_is_used(configure: Configure, tmp_path: Path) -> None:
    first = prepare(configure())
    config = configure(tokenizer=tmp_path / "out", vocab_size=8192, out=tmp_path / "again")
    again = prepare(config)
    assert again.tokenizer_sha256 == first.tokenizer_sha256
    assert again.splits["train"].shards == first.splits["train"].shards


def test_limits_in_a_given_tokenizer_are_lifted(configure: Configure, tmp_path: Path) -> None:
    first = prepare(configure())
    limited = load_tokenizer(tmp_path / "out")
    limited.enable_truncation(5)
    limited.enable_padding(length=500)
    limited.save(str(tmp_path / "limited.json"))
    config = configure(tokenizer=tmp_path / "limited.json", vocab_size=8192, out=tmp_path / "again")
    assert prepare(config).splits["train"].shards == first.splits["train"].shards


def test_a_large_vocabulary_takes_four_bytes_a_token(configure: Configure, tmp_path: Path) -> None:
    prepare(configure())
    small = TokenDataset.open(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["far"] = 70_000
    (tmp_path / "large.json").write_text(json.dumps(content), encoding="utf-8")
    config = configure(tokenizer=tmp_path / "large.json", vocab_size=8192, out=tmp_path / "large")
    assert prepare(config).dtype == "uint32"
    large = TokenDataset.open(config.out)
    assert large.vocab_size == len(large.token_byte_lengths()) == 70_001
    assert large.document(0).dtype == "<u4"
    assert large.document(3).tolist() == small.document(3).tolist()


def test_held_out_text_does_not_shape_the_tokenizer(tmp_path: Path, configure: Configure) -> None:
    files = []
    for number, word in enumerate(("zebra ", "quilt ")):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(word * 50, encoding="utf-8")
    config = configure(sources=tuple(files), validation_fraction=0.5)
    prepare(config)
    (train,) = texts_of(config.out)["train"]
    (held_out,) = texts_of(config.out)["validation"]
    vocabulary = load_tokenizer(config.out).get_vocab()
    assert "Ġ" + train.split()[0] in vocabulary
    assert "Ġ" + held_out.split()[0] not in vocabulary


def test_options_without_effect_are_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size must not be set when tokenizer is given"):
        configure(tokenizer=tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match=r"minhash_threshold must not be set when dedup is not"):
        configure(minhash_threshold=0.5)
    with pytest.raises(ConfigError, match=r"text_field must not be set without JSONL or Parquet"):
        prepare(configure(text_field="body"))
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"split_documents_bytes must not be set without \.txt"):
        prepare(configure(sources=(lines,), split_documents_bytes=64))


def test_split_size_must_fit_the_largest_document(configure: Configure) -> None:
    with pytest.raises(ValueError, match=r"split_documents_bytes must be at most half of max_doc"):
        configure(split_documents_bytes=100, max_document_bytes=150)


def test_output_inside_a_source_is_refused(corpus: Path, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"out must not lie inside a source"):
        prepare(configure(out=corpus / "out"))


def test_configuration_reads_from_plain_values() -> None:
    values = {"sources": ["a.txt", "b"], "out": "o", "dedup": "exact"}
    config = parse_config(PrepareConfig, values, "data.toml")
    assert config.sources == (Path("a.txt"), Path("b"))
    assert config.dedup == "exact"
    with pytest.raises(ConfigError, match=r"did you mean vocab_size\?"):
        parse_config(PrepareConfig, values | {"vocabsize": 4}, "data.toml")
