"""Runs that follow runs: weights, moments, data; the recipe of long context as run files."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_run import stop_at
from train_helpers import HandSample, config_of, flat, run_table
from typer.testing import CliRunner

from sevenfold.cli.main import app
from sevenfold.config import ConfigError, DataError
from sevenfold.data import MixtureLoader, PackedLoader, PrepareConfig, TokenDataset, prepare
from sevenfold.models.checkpoint import load_model
from sevenfold.models.presets import preset
from sevenfold.train import load_run_config, read_metrics, train
from sevenfold.train.checkpoint import list_checkpoints, load_checkpoint, run_tensors
from sevenfold.train.recipe import long_context_stages, write_stages
from sevenfold.train.run import _build
from sevenfold.train.run_data import open_data, training_loader, validation_loader
from sevenfold.train.stages import find_start, first_rows
from sevenfold.train.validation import validate

SOURCES = [
    {"name": "short", "weight": 0.5, "end_weight": 0.2, "max_tokens": 60},
    {"name": "long", "weight": 0.5, "end_weight": 0.8, "min_tokens": 60},
]
WORDS = "the river held its colour while nine grey herons stood quite still beside old stones"


def mixed(data_path: Path, out: Path, **sections: dict):
    table = run_table(data_path, out)
    sources = [{**source, "path": str(data_path)} for source in SOURCES]
    table["data"] = {"seq_len": 32, "sources": sources, "mixture_tokens": 8 * 96}
    return config_of(table, **sections)


def tensors_of(config, checkpoint: Path) -> dict[str, torch.Tensor]:
    data = open_data(config)
    trainer = _build(config, data, training_loader(data, {}), torch.device("cpu"))
    tensors = run_tensors(trainer.model, trainer.optimizer)
    load_checkpoint(checkpoint, tensors)
    return flat(tensors)


def test_a_stage_begins_with_weights_moments_and_data_of_the_one_before(
    data_path: Path, tmp_path: Path
) -> None:
    first = mixed(data_path, tmp_path / "a")
    before = train(first)
    longer = {"start_from": str(tmp_path / "a"), "steps": 3, "checkpoint_every_steps": 1}
    second = mixed(
        data_path,
        tmp_path / "b",
        run=longer,
        data={"seq_len": 64, "mixture_tokens": 3 * 192},
        batch={"tokens_per_step": 192},
        model={**run_table(data_path, tmp_path)["model"], "rope_theta": 5e6},
        # A rate of nothing: what the step leaves is what it found.
        optimizer={"lr": 1e-30, "weight_decay": 0.0},
    )
    start = find_start(second)
    assert start is not None
    rows = training_loader(open_data(first), {}).rows_read(8 * 3)
    assert sum(rows.values()) == 24
    assert start.tokens_read == {name: 32 * count for name, count in rows.items()}
    assert (start.step, before.progress.step) == (8, 8)
    assert first_rows(second, start) == {n: -(-32 * c // 64) for n, c in rows.items()}
    trained = train(second)
    assert (trained.progress.step, trained.resumed_step) == (3, None)
    # Weights of the stage before, whose rotation alone has changed; moments went on from theirs.
    old, new = (load_model(run.final) for run in (before, trained))
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert new.config.rope_theta == 5e6
    steps = [t for n, t in newest(second).items() if n.endswith(".step")]
    assert {float(step) for step in steps} == {11.0}


def newest(config) -> dict[str, torch.Tensor]:
    return tensors_of(config, list_checkpoints(config.run.out / "checkpoints")[-1])


def test_a_stage_reads_on_where_the_other_stopped(data_path: Path, tmp_path: Path) -> None:
    """With rows of one length no pair of tokens comes twice before an epoch is over."""
    first = mixed(data_path, tmp_path / "a", run={"steps": 2})
    train(first)
    second = mixed(data_path, tmp_path / "b", run={"start_from": str(tmp_path / "a"), "steps": 2})
    train(second)
    start = find_start(second)
    loader = training_loader(open_data(second), first_rows(second, start))
    earlier = training_loader(open_data(first), {})
    assert isinstance(loader, MixtureLoader)
    read = [earlier.source_of(i) for i in range(6)] + [loader.source_of(i) for i in range(6)]
    assert len(set(read)) == 12
    # It is kept in the run's own folder, and stays when the run before has gone.
    list_checkpoints(tmp_path / "a" / "checkpoints")[-1].rename(tmp_path / "gone")
    assert find_start(second) == start
    assert json.loads((tmp_path / "b" / "stage.json").read_text())["step"] == 2
    longer = mixed(data_path, tmp_path / "b", run={"start_from": str(tmp_path / "a"), "steps": 3})
    assert train(longer).progress.step == 3


def test_a_run_without_checkpoint_starts_nothing(run_values: dict, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.start_from must be a run with a checkpoint, got"):
        train(config_of(run_values, run={"start_from": str(tmp_path / "none")}))


def test_an_unfinished_run_starts_nothing_until_it_is_ended(
    run_values: dict, tmp_path: Path
) -> None:
    before = config_of(run_values)
    train(before, on_step=stop_at(3, signal.SIGTERM))
    following = config_of(
        run_values, run={"out": str(tmp_path / "b"), "start_from": str(before.run.out), "steps": 1}
    )
    message = r"must be a run that is complete, got .*, which has done 3 of its 8 .* run.steps=3"
    with pytest.raises(ConfigError, match=message):
        train(following)
    train(config_of(run_values, run={"steps": 3}))
    assert train(following).progress.step == 1


def test_a_resumed_mixture_repeats_bit_for_bit(data_path: Path, tmp_path: Path) -> None:
    whole = mixed(data_path, tmp_path / "a")
    train(whole)
    for steps in (3, 8):
        train(mixed(data_path, tmp_path / "b", run={"steps": steps}))
    losses = [[line["loss"] for line in read_metrics(tmp_path / n / "metrics.jsonl")] for n in "ab"]
    assert losses[0] == losses[1]


def test_too_many_epochs_are_refused(data_path: Path, tmp_path: Path, run_values: dict) -> None:
    with pytest.raises(ConfigError, match=r"max_epochs of 'data' must allow the \d+\.\d+ epochs"):
        train(config_of(run_values, run={"steps": 1000}, data={"max_epochs": 4.0}))
    loader = PackedLoader(TokenDataset.open(data_path, "train"), seq_len=32, seed=0)
    steps = loader.num_samples_per_epoch() // 3
    assert train(config_of(run_values, run={"steps": steps}, data={"max_epochs": 1.0})).final


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "x", "sources": SOURCES}, "data must have either path or sources, got both"),
        ({}, "data must have either path or sources, got neither"),
        ({"path": "x", "mixture_tokens": 5}, "mixture_tokens must be left out without sources"),
        ({"sources": SOURCES, "max_epochs": 1.0}, "max_epochs must stand in each source"),
        ({"sources": SOURCES}, "mixture_tokens must be given where weights change, got none"),
        ({"sources": [SOURCES[0], SOURCES[0]]}, "sources must have different names"),
        ({"sources": [{"name": "a", "weight": 0.0}]}, "must have a weight above 0, got"),
        (
            {"sources": [{"name": "a"}, {"name": "b", "weight": 1.0, "begin_share": 0.5}]},
            "weight must be a share below 1 without end_weight where begin_share is above 0",
        ),
        ({"sources": [{"name": "a", "min_tokens": 5, "max_tokens": 5}]}, "max_tokens must be abo"),
    ],
)
def test_rules_of_sources(tmp_path: Path, data: dict, message: str) -> None:
    table = run_table(tmp_path, tmp_path)
    sources = [{"path": "x", **source} for source in data.get("sources", [])]
    table["data"] = {**data, **({"sources": sources} if sources else {})}
    with pytest.raises(ConfigError, match=message):
        config_of(table)


def base_run(tmp_path: Path):
    table = run_table(Path("tokens"), tmp_path / "base")
    table["model"] = preset("nano-hybrid").model_dump(mode="json")
    return config_of(table, schedule={"kind": "wsd", "decay_steps": 2, "min_ratio": 0.15})


def test_the_recipe_is_the_published_table(tmp_path: Path) -> None:
    stages = list(long_context_stages(base_run(tmp_path), questions=Path("qa")).values())
    assert [s.data.seq_len for s in stages] == [131_072, 524_288, 1_048_576]
    assert [s.model.rope_theta for s in stages] == [5e6, 1e7, 1e7]
    for stage in stages:
        assert stage.data.mixture_tokens == stage.run.steps * stage.batch.tokens_per_step
    tokens = [s.run.steps * s.batch.tokens_per_step for s in stages]
    for found, billions in zip(tokens, (300, 32, 26), strict=True):
        assert abs(found - billions * 1e9) < 2**20  # to a step
    ends = [
        {s.name: s.end_weight for s in stage.data.sources if s.begin_share == 0} for stage in stages
    ]
    assert ends == [
        {"data-short": 0.3, "data-medium": 0.7},
        {"data-short": 0.35, "data-medium": 0.35, "data-long": 0.3},
        {"data-short": 0.3, "data-medium": 0.3, "data-long": 0.4},
    ]
    # Each begins with the weights of the one before, and follows it.
    starts = [{s.name: s.weight for s in stage.data.sources} for stage in stages]
    assert (starts[1]["data-medium"], starts[1]["data-long"]) == (0.7, 0.0)
    assert starts[2]["data-short"] == 0.35
    assert [s.run.start_from for s in stages] == [
        tmp_path / "base",
        *(s.run.out for s in stages[:2]),
    ]
    borders = {s.name: (s.min_tokens, s.max_tokens) for s in stages[2].data.sources}
    assert borders["data-short"] == (1, 32_768)
    assert borders["data-medium"] == (32_768, 131_072)
    assert borders["data-long"] == (131_072, None)
    questions = [s for s in stages[0].data.sources if s.name == "questions"]
    assert [(q.weight, q.begin_share, q.max_tokens) for q in questions] == [(0.1, 0.8, 2**17 + 1)]
    lr = base_run(tmp_path).optimizer.lr
    assert {s.optimizer.lr for s in stages} == {lr * (1 - 0.85 * 0.5**0.5)}


def test_the_command_writes_stages_that_load(tmp_path: Path) -> None:
    base = base_run(tmp_path)
    write_stages({"base": base}, tmp_path)
    arguments = ["--stages", str(tmp_path / "s"), "--longest", "16384", "--stage-tokens", "9000000"]
    done = CliRunner().invoke(
        app, ["train", str(tmp_path / "base.toml"), *arguments], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "s").iterdir())
    assert [load_run_config(file).data.seq_len for file in files] == [2048, 8192, 16_384]
    with pytest.raises(ConfigError, match="longest must be a multiple of 8 of 8192 tokens or more"):
        long_context_stages(base, longest_tokens=4096)
    with pytest.raises(
        ConfigError, match="stage tokens must make a step of 8192 tokens in stage 2-half"
    ):
        long_context_stages(base, longest_tokens=16_384, stage_tokens=30_000)


def test_the_run_files_beside_the_160m_run_are_the_recipes() -> None:
    folder = Path(__file__).parents[2] / "configs"
    questions = Path("data/long-questions/tokens")
    stages = long_context_stages(load_run_config(folder / "160m-gpu.toml"), questions=questions)
    files = {name: folder / "long-context" / f"{name}.toml" for name in stages}
    assert {name: load_run_config(file) for name, file in files.items()} == stages


def long_documents(folder: Path, counts: dict[int, int], tokenizer: Path | None = None) -> Path:
    """A dataset of so many documents of about so many tokens, a fifth of them held out."""
    (folder / "text").mkdir(parents=True)
    words = WORDS.split()
    for length, count in counts.items():
        for i in range(count):
            said = " ".join(words[(i * j + i + length) % len(words)] for j in range(1, length))
            (folder / "text" / f"{length}-{i:02}.txt").write_text(said[: 3 * length])
    out = folder / "tokens"
    made = {"vocab_size": 300} if tokenizer is None else {"tokenizer": tokenizer}
    text = (folder / "text",)
    prepare(PrepareConfig(sources=text, out=out, validation_fraction=0.2, **made))
    return out


@pytest.fixture(scope="session")
def long_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_documents(tmp_path_factory.mktemp("long"), {60: 60, 300: 20, 1500: 12})


def long_base(data_path: Path, out: Path, **sections: dict):
    table = run_table(data_path, out)
    table["run"] |= {"steps": 2}
    table["data"] |= {"seq_len": 64}
    table["batch"] = {"tokens_per_step": 4096, "micro_batch_rows": 8}
    table["validation"] = {"every_steps": 4, "num_samples": 32}
    return config_of(table, **sections)


def test_the_recipes_stages_run_one_after_another(long_path: Path, tmp_path: Path) -> None:
    base = long_base(long_path, tmp_path / "base")
    train(base)
    # 23, 1 and 1 steps of 4,096, 4,096 and 8,192 tokens.
    stages = long_context_stages(base, longest_tokens=8192, stage_tokens=113_000)
    assert [s.validation.num_samples * s.data.seq_len for s in stages.values() if s.validation] == [
        2048,
        4096,
        8192,
    ]
    for path in write_stages(stages, tmp_path / "files"):
        config = load_run_config(path)
        assert train(config).progress.step == config.run.steps
        lines = read_metrics(config.run.out / "metrics.jsonl")
        assert all(np.isfinite(line["loss"]) for line in lines)
        assert np.isfinite(lines[-1]["validation_loss"])


def test_stages_count_what_the_base_run_read_of_their_classes(
    long_path: Path, tmp_path: Path
) -> None:
    base = long_base(long_path, tmp_path / "base")
    train(base)
    stages = list(long_context_stages(base, longest_tokens=8192, stage_tokens=113_000).values())
    lengths = TokenDataset.open(long_path, "train").document_lengths()
    read, total = 2 * 4096, lengths.sum()
    classes = {"short": lengths < 256, "medium": (lengths >= 256) & (lengths < 1024)}
    classes["long"] = lengths >= 1024
    shares = {f"data-{name}": lengths[inside].sum() / total for name, inside in classes.items()}
    start = find_start(stages[0])
    assert start is not None
    expected = {name: round(read * shares[name]) for name in ("data-short", "data-medium")}
    assert start.tokens_read == {"data": read} | expected
    assert all(rows > 0 for rows in first_rows(stages[0], start).values())
    # The second stage has long documents too, of which the base run alone has read.
    first = config_of(stages[0].model_dump(mode="json"), run={"steps": 1})
    train(first)
    start = find_start(stages[1])
    assert start is not None
    assert start.tokens_read["data-long"] == round(read * shares["data-long"])
    rows = training_loader(open_data(first), first_rows(first, find_start(first))).rows_read(4)
    assert start.tokens_read["data-short"] == 1024 * rows["data-short"]
    assert sum(rows.values()) == 4 + sum(-(-count // 1024) for count in expected.values())


def test_parts_of_other_data_or_wider_ones_begin_anew(long_path: Path, tmp_path: Path) -> None:
    sources = [{"name": "middle", "path": str(long_path), "min_tokens": 60, "max_tokens": 256}]
    table = run_table(long_path, tmp_path / "a")
    table["data"] = {"seq_len": 32, "sources": sources}
    train(config_of(table, run={"steps": 1}))
    other = long_documents(tmp_path / "other", {60: 60}, tokenizer=long_path)
    table["data"]["sources"] = [
        {"name": "wider", "path": str(long_path), "min_tokens": 60},
        {"name": "other", "path": str(other), "min_tokens": 60, "max_tokens": 256},
    ]
    start = find_start(config_of(table, run={"start_from": str(tmp_path / "a")}))
    assert start is not None
    assert start.tokens_read == {"middle": 96}


def test_a_refused_class_can_be_left_out(tmp_path: Path) -> None:
    base = long_base(long_documents(tmp_path, {60: 80, 600: 30}), tmp_path / "base")
    train(base)
    _, stage, _ = long_context_stages(base, longest_tokens=8192, stage_tokens=113_000).values()
    stage = config_of(stage.model_dump(mode="json"), run={"start_from": str(tmp_path / "base")})
    with pytest.raises(DataError, match=r"source 'data-long' must have .* leave the source out"):
        train(stage)
    assert not stage.run.out.exists()
    kept = [s for s in stage.model_dump(mode="json")["data"]["sources"] if s["name"] != "data-long"]
    assert train(config_of(stage.model_dump(mode="json"), data={"sources": kept})).final


def test_validation_takes_the_classes_that_are_held_out(tmp_path: Path) -> None:
    path = long_documents(tmp_path, {60: 60, 600: 1})
    lengths = {n: TokenDataset.open(path, n).document_lengths() for n in ("train", "validation")}
    assert (max(lengths["train"]) >= 256, max(lengths["validation"]) < 256) == (True, True)
    base = long_base(path, tmp_path / "base")
    stage, *_ = long_context_stages(base, longest_tokens=8192, stage_tokens=113_000).values()
    loader, num_rows = validation_loader(stage)
    assert num_rows == -(-int(sum(lengths["validation"] - 1)) // 1024)
    assert max(loader.sample(0).lengths) < 256
    sources = [{"name": "long", "path": str(path), "min_tokens": 256}]
    with pytest.raises(DataError, match="source 'long' must have a document of 256 tokens or more"):
        validation_loader(
            config_of(run_table(path, tmp_path), data={"path": None, "sources": sources})
        )


def test_losses_by_position_and_length_are_the_tokens_own(run_values: dict) -> None:
    config = config_of(run_values, data={"seq_len": 700}, batch={"tokens_per_step": 700})
    data = open_data(config)
    trainer = _build(config, data, training_loader(data, {}), torch.device("cpu"))
    documents = [np_ids(n, seed) for seed, n in enumerate((40, 300, 360))]
    loader = Rows(documents)
    model = trainer.model.double()
    found = validate(model, loader, 1, micro_batch_rows=None, autocast=None)
    losses, positions, lengths = [], [], []
    for ids in documents:
        n = len(ids) - 1
        logits = model(torch.tensor(ids[None, :-1]))[0].detach()
        target = torch.tensor(ids[1:])
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        positions.append(torch.arange(n))
        lengths.append(torch.full((n,), n))
    loss, position, length = (torch.cat(x) for x in (losses, positions, lengths))
    eps = torch.finfo(torch.float64).eps * 1e3
    assert abs(found.loss - loss.mean()) < eps * found.loss
    for name, value in (("by_position", position), ("by_length", length)):
        expected = {0: loss[value < 256].mean(), 256: loss[value >= 256].mean()}
        got = getattr(found, name)
        assert got.keys() == expected.keys()
        assert all(abs(got[key] - expected[key]) < eps * found.loss for key in got)


class Rows:
    """One row of given documents."""

    def __init__(self, documents: list) -> None:
        self._documents = documents

    def sample(self, index: int) -> HandSample:
        assert index == 0
        ids = np.concatenate([ids[:-1] for ids in self._documents])
        labels = np.concatenate([ids[1:] for ids in self._documents])
        return HandSample(ids, labels, tuple(len(d) - 1 for d in self._documents), 2000)


def np_ids(num_labels: int, seed: int):
    return np.random.default_rng(seed).integers(0, 290, num_labels + 1)
