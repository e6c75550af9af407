"""The builder of long questions: answers stand in the text, wherever, and stages read them late."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

from sevenfold.config import DataError, parse_config
from sevenfold.data import MixtureLoader, PrepareConfig, TokenDataset, prepare
from sevenfold.models import preset
from sevenfold.train import RunConfig
from sevenfold.train.recipe import long_context_stages
from sevenfold.train.run_data import open_data, training_loader

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import long_questions  # noqa: E402

NOUNS = ["river", "heron", "stone", "colour", "window", "letter", "garden", "candle"]
VERBS = ["held", "found", "left", "saw", "carried", "followed", "painted", "remembered"]


def document(seed: int) -> str:
    """Paragraphs of sentences that differ; some have lines within."""
    chosen = random.Random(seed)

    def sentence() -> str:
        pairs = (f"the {chosen.choice(NOUNS)} {chosen.choice(VERBS)}" for _ in range(5))
        return f"{' '.join(pairs)} {chosen.randrange(10**6)}.".capitalize()

    return "\n\n".join(" ".join(sentence() for _ in range(6)) + "\n" + sentence() for _ in range(9))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    (folder / "text").mkdir()
    for seed in range(40):
        (folder / "text" / f"{seed:02}.txt").write_text(document(seed))
    config = PrepareConfig(
        sources=(folder / "text",), out=folder / "tokens", vocab_size=400, validation_fraction=0.1
    )
    prepare(config)
    return folder / "tokens"


def texts(out: Path) -> list[str]:
    lines = (out / "documents.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_answers_stand_in_the_text_from_its_beginning_to_its_end(
    data: Path, tmp_path: Path
) -> None:
    made = long_questions.build(data, tmp_path, lengths=[16_384], documents=5, seed=1)
    lengths = TokenDataset.open(tmp_path / "tokens", "train").document_lengths()
    assert (made, len(lengths)) == (3, 3)
    assert all(12_000 < length <= 16_384 for length in lengths)
    depths, kinds = [], set()
    for text in texts(tmp_path):
        body, *asked = re.split(r"\n\nQuestion: ", text)
        assert len(asked) == long_questions.QUESTIONS
        flat = " ".join(body.split())
        for question in asked:
            cue, answer = re.fullmatch(r'.*"(.+)"\?\nAnswer: (.+)', question).groups()
            kind = question.split()[0:2]
            kinds.add(tuple(kind))
            assert flat.count(cue) == 1
            place = flat.index(cue)
            depths.append(place / len(flat))
            if kind == ["How", "does"]:
                assert flat[place:].startswith(f"{cue} {answer}")
            elif kind == ["Which", "sentence"]:
                assert flat[:place].rstrip().endswith(answer)
            else:
                assert re.findall(r"Section \d+", flat[:place])[-1] == answer
    assert len(kinds) == 3
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_the_same_arguments_give_the_same_texts(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        long_questions.build(data, tmp_path / name, lengths=[8192], documents=2, seed=seed)
    a, b, c = (texts(tmp_path / name) for name in "abc")
    assert a == b != c


def test_questions_are_of_training_text_alone(data: Path, tmp_path: Path) -> None:
    long_questions.build(data, tmp_path, lengths=[8192], documents=50, seed=0)
    made = " ".join(" ".join(texts(tmp_path)).split())
    held_out = [seed for seed in range(40) if document(seed).split(".")[0] not in made]
    assert len(held_out) >= TokenDataset.open(data, "validation").num_documents >= 1


def test_a_text_too_short_for_a_length_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--lengths must have one that the text of"):
        long_questions.build(data, tmp_path, lengths=[10**7], documents=1, seed=0)


def base_run(data: Path) -> RunConfig:
    table = {
        "run": {"out": "run", "steps": 1},
        "data": {"path": str(data), "seq_len": 256},
        "model": preset("nano-hybrid").model_dump(mode="json"),
        "optimizer": {"lr": 0.01},
        "batch": {"tokens_per_step": 8192},
    }
    return parse_config(RunConfig, table, "test")


@pytest.mark.parametrize("name", ["2-half", "3-whole"])
def test_a_stage_reads_whole_texts_in_its_last_fifth(data: Path, tmp_path: Path, name: str) -> None:
    long_questions.build(data, tmp_path, lengths=[8192, 16_384], documents=8, seed=0)
    stages = long_context_stages(
        base_run(data),
        longest_tokens=16_384,
        stage_tokens=900_000_000,
        questions=tmp_path / "tokens",
    )
    values = stages[name].model_dump(mode="json")
    # The class that all documents of this data are in.
    values["data"]["sources"] = [
        source
        for source in values["data"]["sources"]
        if source["name"] in ("data-medium", "questions")
    ]
    config = parse_config(RunConfig, values, "test")
    loader = training_loader(open_data(config), {})
    assert isinstance(loader, MixtureLoader)
    total = config.total_rows()
    assert loader.rows_read(total * 3 // 4)["questions"] == 0
    assert abs(loader.rows_read(total)["questions"] / total - 0.02) < 0.003
    number = [source.name for source in loader.sources].index("questions")
    row = next(i for i in range(total) if loader.source_of(i)[0] == number)
    lengths = TokenDataset.open(tmp_path / "tokens", "train").document_lengths()
    found = loader.sample(row).lengths
    # Whole texts, those that a row holds.
    assert max(found) + 1 in lengths
    assert config.data.seq_len // 2 < max(found) <= config.data.seq_len


def test_a_row_too_short_for_any_text_is_refused(data: Path, tmp_path: Path) -> None:
    long_questions.build(data, tmp_path, lengths=[8192], documents=1, seed=0)
    path = tmp_path / "tokens"
    stage, *_ = long_context_stages(
        base_run(data), longest_tokens=16_384, stage_tokens=90_000_000, questions=path
    ).values()
    values = stage.model_dump(mode="json")
    values["data"]["sources"] = [s for s in values["data"]["sources"] if s["name"] != "data-short"]
    config = parse_config(RunConfig, values, "test")
    with pytest.raises(DataError, match="source 'questions' must have a document of"):
        training_loader(open_data(config), {})
