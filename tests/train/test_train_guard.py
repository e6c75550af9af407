"""Steps that are skipped, runs that go back, batches that grow with the loss."""

import math
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_train_loop import BAD, GOOD, trainer_on, without_nan
from test_train_run import newest_tensors, stop_at
from train_helpers import HandLoader, config_of, copied_tensors, differing, repeatable

from sevenfold.config import ConfigError, DataError, TrainingError
from sevenfold.data import PackedLoader
from sevenfold.train import read_metrics, train
from sevenfold.train.checkpoint import list_checkpoints
from sevenfold.train.config import CriticalBatch, GuardSection
from sevenfold.train.guard import fault_in, remembered
from sevenfold.train.loop import StepOutcome, UnreadError, train_steps
from sevenfold.train.progress import Progress
from sevenfold.train.step import StepValues

GUARD = GuardSection(spike_deviations=3.0, spike_window=4)
RECENT = Progress(recent_losses=(1.0, 2.0, 1.0, 2.0), recent_norms=(1.0, 1.0, 1.0, 1.0))


def values(loss: float, norm: float = 1.0) -> StepValues:
    return StepValues(loss, norm, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("loss", "norm", "fault"),
    [
        (3.0, 1.0, None),  # mean 1.5, deviation 0.5: the limit itself
        (3.001, 1.0, "loss 3.001 is a spike above 3"),
        (1.0, 1.001, "grad_norm 1.001 is a spike above 1"),
        (0.0, 0.0, None),
        (math.nan, 1.0, "loss is nan"),
    ],
)
def test_a_spike_lies_beyond_so_many_deviations(loss: float, norm: float, fault: str) -> None:
    recent = (*RECENT.recent_losses,)
    assert statistics.fmean(recent) + 3 * statistics.pstdev(recent) == 3.0
    assert fault_in(values(loss, norm), RECENT, GUARD) == fault


def test_nothing_is_a_spike_before_the_window_is_full_or_without_the_rule() -> None:
    short = RECENT.model_copy(update={"recent_losses": (1.0,), "recent_norms": (1.0,)})
    assert fault_in(values(1e9), short, GUARD) is None
    assert fault_in(values(1e9), RECENT, GuardSection()) is None
    after = remembered(RECENT, values(5.0, 6.0), GUARD)
    assert after.recent_losses == (2.0, 1.0, 2.0, 5.0)
    assert after.recent_norms[-1] == 6.0
    assert remembered(RECENT, values(5.0), GuardSection()) is RECENT


def run(trainer, rewind=lambda: None) -> tuple[Progress, list[StepOutcome]]:
    outcomes: list[StepOutcome] = []
    end = train_steps(
        trainer, Progress(), after_step=outcomes.append, stop=lambda: False, rewind=rewind
    )
    return end, outcomes


def test_after_repeated_skips_the_run_goes_on_from_a_checkpoint_past_their_samples() -> None:
    guard = {"rewind_after_skips": 2, "max_skipped_steps": 2}
    trainer = trainer_on([*GOOD[:6], *[BAD] * 4, *GOOD[6:]], guard=guard)
    kept: list[tuple[Progress, dict]] = []

    def after(outcome: StepOutcome) -> None:
        outcomes.append(outcome)
        if outcome.progress.step == 1 and not kept:
            kept.append((outcome.progress, state_of(trainer)))

    def rewind() -> Progress:
        progress, state = kept[0]
        load_state(trainer, state)
        return progress

    outcomes: list[StepOutcome] = []
    end = train_steps(trainer, Progress(), after_step=after, stop=lambda: False, rewind=rewind)
    assert [o.progress.step for o in outcomes] == [1, 2, 3, 3, 3, 2, 3, 4]
    assert [o.goes_back for o in outcomes] == [False] * 4 + [True] + [False] * 3
    assert (end.num_rewinds, end.num_skipped, end.next_sample) == (1, 2, 16)
    # As if steps 2 and 3 had never been: the checkpoint's step, then the samples after the window.
    clean = trainer_on([*GOOD[:2], *GOOD[6:]])
    run(clean)
    tensors = (without_nan(copied_tensors(t)) for t in (trainer, clean))
    assert differing(*tensors) == []


def state_of(trainer) -> dict[str, torch.Tensor]:
    return copied_tensors(trainer)


def load_state(trainer, state: dict[str, torch.Tensor]) -> None:
    model, optimizer = trainer.model, trainer.optimizer
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"model.{name}"].view_as(parameter))
            for key, value in optimizer.state[parameter].items():
                value.copy_(state[f"optimizer.{name}.{key}"].view_as(value))


def test_a_run_does_not_go_back_forever_nor_without_a_checkpoint() -> None:
    guard = {"rewind_after_skips": 1, "max_rewinds": 2}
    start = Progress()
    with pytest.raises(TrainingError, match=r"must go back at most 2 times .* got 1 skipped steps"):
        run(trainer_on([*GOOD[:2], *[BAD] * 50], guard=guard), rewind=lambda: start)
    with pytest.raises(
        TrainingError, match=r"rewind_after_skips must have a checkpoint to go back"
    ):
        run(trainer_on([BAD], guard=guard))


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ({"rewind_after_skips": 11}, "rewind_after_skips must not exceed max_skipped_steps = 10"),
        ({"exit_stalled_s": 5.0}, r"exit_stalled_s must be left out without stall_s, .* got 5\.0"),
        ({"exit_stalled_s": 5.0, "stall_s": 9.0}, r"must be at least stall_s = 9\.0, got 5\.0"),
    ],
)
def test_rules_of_the_guard(run_values: dict, guard: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(run_values, guard=guard)


CRITICAL = {
    "tokens_per_step": 32,
    "critical": {
        "max_tokens_per_step": 128,
        # Twice 32 tokens at a loss of 5.8, which a model of 300 words passes at once.
        "coefficient": 64 * 5.8**6.0,
        "exponent": 6.0,
        "smoothing_steps": 2,
    },
}


def test_the_published_doublings_follow_from_the_law() -> None:
    law = CriticalBatch(max_tokens_per_step=2**27)
    for loss, millions in ((2.22, 16), (1.98, 32), (1.77, 64), (1.58, 128)):
        assert abs(math.log2(law.tokens_at(loss) / millions / 1e6)) < 0.1


def test_the_batch_doubles_by_the_loss_and_goes_on_the_same_after_a_stop(
    run_values: dict, tmp_path: Path
) -> None:
    features = {"batch": CRITICAL, "guard": {"spike_deviations": 50.0, "spike_window": 2}}
    whole = train(config_of(run_values, **features))
    lines = read_metrics(whole.folder / "metrics.jsonl")
    ends = [0, *(line["next_sample"] for line in lines)]
    rows = [b - a for a, b in pairwise(ends)]
    assert rows[:2] == [1, 1]  # read before the first loss was known
    smoothed = None
    for i in range(6):
        loss = lines[i]["loss"]
        smoothed = loss if smoothed is None else smoothed + (loss - smoothed) / 2
        pays = 2 * rows[i + 1] * 32 <= min(64 * (5.8 / smoothed) ** 6, 128)
        assert rows[i + 2] == rows[i + 1] * (2 if pays else 1)
    assert rows[-1] > 1
    out = {"run": {"out": str(tmp_path / "b"), "checkpoint_every_steps": 2}}
    config = config_of(run_values, **features, **out)
    assert train(config, on_step=stop_at(3, 15)).final is None
    train(config)
    again = read_metrics(tmp_path / "b" / "metrics.jsonl")
    assert repeatable(again) == repeatable(lines)
    assert (
        differing(newest_tensors(config), newest_tensors(config_of(run_values, **features))) == []
    )


def test_the_batch_has_one_rule(run_values: dict) -> None:
    ramp = [{"from_tokens": 96, "tokens_per_step": 192}]
    with pytest.raises(ConfigError, match="ramp must be left out with critical"):
        config_of(run_values, batch=CRITICAL | {"ramp": ramp})


def test_a_sample_that_cannot_be_read_ends_the_run_and_loses_no_step(
    run_values: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config_of(run_values))
    config = config_of(run_values, run={"out": str(tmp_path / "b")})
    sample = PackedLoader.sample

    def failing(self, index: int):
        if index >= 12:
            raise DataError("a shard must be readable, got: gone")
        return sample(self, index)

    monkeypatch.setattr(PackedLoader, "sample", failing)
    with pytest.raises(DataError, match="a shard must be readable, got: gone"):
        train(config)
    assert [path.name for path in list_checkpoints(tmp_path / "b" / "checkpoints")] == ["step-4"]
    monkeypatch.undo()
    assert train(config).resumed_step == 4
    lines = (read_metrics(f / "metrics.jsonl") for f in (whole.folder, tmp_path / "b"))
    assert repeatable(next(lines)) == repeatable(next(lines))


def test_what_lies_behind_the_last_step_is_not_read(
    run_values: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, sample = config_of(run_values), PackedLoader.sample

    def failing(self, index: int):
        if index >= 24:
            raise DataError("a shard must be readable, got: gone")
        return sample(self, index)

    monkeypatch.setattr(PackedLoader, "sample", failing)
    assert train(config).final is not None
    again = train(config)
    assert (again.resumed_step, again.final) == (8, config.run.out / "final")


def test_a_last_step_that_is_skipped_comes_again_with_the_next_samples() -> None:
    end, outcomes = run(trainer_on([*GOOD[:6], BAD, *GOOD[6:]]))
    clean = run(trainer_on([*GOOD[:6], *GOOD[7:]]))[1]
    assert [o.fault for o in outcomes] == [None, None, None, "loss is nan", None]
    assert (end.step, end.next_sample) == (4, 10)
    assert outcomes[-1].values == clean[-1].values


def test_a_sample_that_a_skipped_last_step_needs_is_told_with_where_the_run_stands() -> None:
    class Ending(HandLoader):
        def sample(self, index: int):
            if index >= 8:
                raise DataError("a shard must be readable, got: gone")
            return super().sample(index)

    trainer = trainer_on([*GOOD[:6], BAD, GOOD[6]])
    trainer = replace(trainer, loader=Ending(trainer.loader.samples))
    with pytest.raises(UnreadError, match="gone") as caught:
        run(trainer)
    assert (caught.value.progress.step, caught.value.progress.next_sample) == (3, 8)
