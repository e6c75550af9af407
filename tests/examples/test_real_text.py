"""The example on real text: readers, needles, comparison; nothing is fetched."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sevenfold.config import parse_config
from sevenfold.data import PrepareConfig, prepare
from sevenfold.models import preset
from sevenfold.train import RunConfig, load_run_config, train

FOLDER = Path(__file__).parents[2] / "examples" / "real_text"
sys.path.insert(0, str(FOLDER))
# What the run files say of every model.
OURS = {"vocab_size": 32_768, "max_position_embeddings": 8192}

import compare  # noqa: E402
import recall  # noqa: E402
import sources  # noqa: E402


def test_pages_lose_their_markup_and_menus() -> None:
    page = "<html><head><title>x</title></head><body><nav>menu</nav><h1>Title</h1>"
    page += "<p>One <b>bold</b>   word.</p><script>var a;</script><p>Two &amp; three.</p></body>"
    assert sources.html_text(page) == "Title\n\nOne bold word.\n\nTwo & three."


def test_readers_find_files_plain_and_gzipped(tmp_path: Path) -> None:
    (tmp_path / "usr/share/doc/a").mkdir(parents=True)
    (tmp_path / "usr/share/doc/a/one.rst").write_text("first")
    (tmp_path / "usr/share/doc/a/two.txt.gz").write_bytes(gzip.compress("zwölf".encode()))
    (tmp_path / "usr/share/doc/a/three.txt").write_bytes("vier\xe9".encode("latin-1"))
    read = sources.plain("usr/share/doc/**/*.rst", "usr/share/doc/**/*.txt*")
    assert sorted(read(tmp_path)) == ["first", "vieré", "zwölf"]


def test_a_dictionary_becomes_documents_of_whole_entries(tmp_path: Path) -> None:
    entries = [f"word{n}\n   meaning {'x' * 2000}" for n in range(20)]
    folder = tmp_path / "usr/share/dictd"
    folder.mkdir(parents=True)
    (folder / "d.dict.dz").write_bytes(gzip.compress("\n".join(entries).encode()))
    documents = list(sources.dictionary(tmp_path))
    assert len(documents) == 3
    assert "\n".join(documents) == "\n".join(entries)


def test_short_documents_are_left_out(tmp_path: Path) -> None:
    source = sources.Source("s", "none", lambda root: iter(["short", "long enough\r\nfor this"]))
    out = tmp_path / "s.jsonl.gz"
    assert sources.write_documents(source, tmp_path, out, 10) == (1, 20)
    [line] = gzip.decompress(out.read_bytes()).decode().splitlines()
    assert json.loads(line) == {"text": "long enough\nfor this", "source": "s"}


def test_sources_have_names_and_licences_of_their_own() -> None:
    names = [source.name for source in sources.SOURCES]
    assert len(set(names)) == len(names) > 20
    assert all(source.licence for source in sources.SOURCES)


@pytest.mark.parametrize("name", ["hybrid", "softmax", "lightning", "hybrid_deepnorm"])
def test_the_run_files_load_and_read_a_hundred_million_tokens(name: str) -> None:
    config, named = load_run_config(FOLDER / f"{name}.toml"), preset(f"160m-{name.split('_')[0]}")
    assert config.model.layer_types == named.layer_types
    assert (config.model == named.model_copy(update=OURS)) is (name == "hybrid_deepnorm")
    assert config.run.steps * config.batch.tokens_per_step >= 100_000_000
    assert config.data.max_epochs == 4.0


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_a_needle_lies_where_it_is_said_to_and_the_end_asks_for_it() -> None:
    haystack = np.arange(1000, 3000)
    asked = recall.questions(haystack, encode, [200, 300], [0.0, 0.5, 1.0], 2)
    assert len(asked) == 2 * 3 * 2 * 2
    for question in asked:
        assert len(question.prompt) == question.length
        prompt, answer = list(question.prompt), list(question.answer)
        if question.task == "number":
            text = "".join(chr(x) for x in prompt if x < 1000)
            cue, _, rest = text.partition(" is")
            assert text.endswith(cue.strip() + " is")
            assert rest.startswith("".join(map(chr, answer)))
        else:
            cue = prompt[-recall.CUE_TOKENS :]
            starts = [i for i in range(len(prompt)) if prompt[i : i + len(cue)] == cue]
            after = starts[0] + len(cue)
            assert prompt[after : after + len(answer)] == answer
    assert recall.questions(haystack, encode, [200], [0.5], 1) == recall.questions(
        haystack, encode, [200], [0.5], 1
    )


@pytest.mark.parametrize(
    ("generated", "share"), [([1, 2, 3], 1.0), ([1, 2, 4], 2 / 3), ([2, 2, 3], 0.0), ([], 0.0)]
)
def test_the_score_counts_tokens_in_order(generated: list[int], share: float) -> None:
    assert recall.score([1, 2, 3], generated) == share


def test_runs_are_asked_and_compared(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"the old stone {i} lay in the river " * 20)
    data = tmp_path / "tokens"
    prepare(
        PrepareConfig(
            sources=(tmp_path / "text",), out=data, vocab_size=300, validation_fraction=0.3
        )
    )
    runs = []
    for form in ("hybrid", "softmax"):
        model = preset(f"nano-{form}").model_dump(mode="json")
        model |= {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
        model |= {"rotary_dim": 4, "moe": None}
        table = {
            "run": {"out": str(tmp_path / form), "steps": 3},
            "data": {"path": str(data), "seq_len": 64},
            "model": model,
            "optimizer": {"lr": 0.01},
            "batch": {"tokens_per_step": 128},
            "validation": {"every_steps": 2, "num_samples": 2},
        }
        final = train(parse_config(RunConfig, table, "test")).final
        assert final is not None
        runs.append(str(tmp_path / form))
        common = ["--data", str(data), "--device", "cpu", "--lengths", "100", "--depths", "0.5"]
        arguments = ["recall.py", str(final), *common, "--trials", "1"]
        monkeypatch.setattr(sys, "argv", arguments)
        recall.main()
    monkeypatch.setattr(sys, "argv", ["compare.py", *runs, "--out", str(tmp_path / "c")])
    compare.main()
    record = json.loads((tmp_path / "c" / "comparison.json").read_text())["runs"]
    assert [run["run"] for run in record] == ["hybrid", "softmax"]
    for run in record:
        assert (run["updates"], run["tokens"]) == (3, 384)
        assert run["validation_loss"] == run["validation_curve"][-1][1]
        assert {row["task"] for row in run["recall"]} == {"number", "passage"}
        assert all(0 <= row["share_right"] <= 1 for row in run["recall"])
    assert (tmp_path / "c" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "| softmax | 384 |" in capsys.readouterr().out
