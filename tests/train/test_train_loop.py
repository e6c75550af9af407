from pathlib import Path

import pytest
import torch
from train_helpers import (
    VOCAB_SIZE,
    HandLoader,
    config_of,
    copied_tensors,
    differing,
    hand_sample,
    run_table,
    tiny_model,
)

from sevenfold.config import TrainingError
from sevenfold.optim import build_adamw
from sevenfold.train.loop import StepOutcome, Trainer, train_steps
from sevenfold.train.progress import Progress

BAD_TOKEN = VOCAB_SIZE - 1
GOOD = [hand_sample(i, num_ignored=i % 5) for i in range(12)]
BAD = hand_sample(99, token=BAD_TOKEN)


def trainer_on(samples: list, *, clip: float | None = 1.0, **sections: dict) -> Trainer:
    """A trainer of 2 rows a step, whose model has a NaN in the row of BAD_TOKEN."""
    tables = run_table(Path("data"), Path("out"))
    sections = {
        "run": {"steps": 4},
        "data": {"seq_len": 16},
        "optimizer": {"weight_decay": 0.0, **({} if clip is None else {"max_grad_norm": clip})},
        "batch": {"tokens_per_step": 32},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
    } | sections
    config = config_of(tables, **sections)
    model = tiny_model()
    with torch.no_grad():
        model.embed_tokens.weight[BAD_TOKEN] = float("nan")
    optimizer = build_adamw(model.named_parameters(), config.optimizer)
    return Trainer(config, model, optimizer, HandLoader(samples))


def run(trainer: Trainer) -> tuple[Progress, list[StepOutcome]]:
    outcomes: list[StepOutcome] = []
    progress = train_steps(trainer, Progress(), after_step=outcomes.append, stop=lambda: False)
    return progress, outcomes


def without_nan(tensors: dict) -> dict:
    return {name: torch.nan_to_num(value) for name, value in tensors.items()}


def test_a_skipped_step_is_as_if_its_samples_did_not_exist() -> None:
    clean, interrupted = trainer_on(GOOD), trainer_on([*GOOD[:4], GOOD[10], BAD, *GOOD[4:]])
    clean_end, clean_outcomes = run(clean)
    end, outcomes = run(interrupted)
    assert [o.fault for o in outcomes] == [None, None, "loss is nan", None, None]
    kept = [o for o in outcomes if o.fault is None]
    assert [o.values for o in kept] == [o.values for o in clean_outcomes]
    assert [o.lr for o in kept] == [o.lr for o in clean_outcomes]
    tensors = (without_nan(copied_tensors(t)) for t in (clean, interrupted))
    assert differing(*tensors) == []
    assert (end.step, end.next_sample, end.num_skipped, end.skipped_in_a_row) == (4, 10, 1, 0)
    assert (clean_end.next_sample, clean_end.num_labels) == (8, end.num_labels)


def test_a_gradient_that_is_not_finite_skips_too() -> None:
    trainer = trainer_on(GOOD)
    calls = []

    def overflow_once(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("inf") if len(calls) == 2 else gradient

    trainer.model.norm.weight.register_hook(overflow_once)
    _, outcomes = run(trainer)
    assert outcomes[1].fault in ("grad_norm is inf", "grad_norm is nan")
    assert [o.fault is None for o in outcomes] == [True, False, True, True, True]
    assert all(torch.isfinite(p[:BAD_TOKEN]).all() for p in trainer.model.parameters())


def test_too_many_skips_in_a_row_stop_the_run_and_leave_the_weights() -> None:
    trainer = trainer_on([*GOOD[:4], *[BAD] * 100], guard={"max_skipped_steps": 3})
    with pytest.raises(
        TrainingError,
        match=r"at most 3 steps in a row must be skipped .* got 4 after step 2: loss is nan; "
        r".*samples before 12.*lower optimizer\.lr",
    ):
        run(trainer)
    two_steps = trainer_on(GOOD)
    train_steps(two_steps, Progress(), after_step=lambda _: None, stop=_after(2))
    tensors = (without_nan(copied_tensors(t)) for t in (trainer, two_steps))
    assert differing(*tensors) == []


def _after(num_steps: int):
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > num_steps

    return stop


def test_no_skip_is_forgiven_when_none_may_be() -> None:
    with pytest.raises(TrainingError, match=r"at most 0 steps in a row .* got 1 after step 0"):
        run(trainer_on([BAD], guard={"max_skipped_steps": 0}))


def test_the_learning_rate_follows_the_schedule() -> None:
    _, outcomes = run(trainer_on(GOOD))
    assert [o.lr for o in outcomes] == [0.005, 0.01, 0.01, 0.01 * (0.1 + 0.9 * 0.5)]


def test_clipping_scales_the_update_and_reports_the_norm_before() -> None:
    free, clipped = trainer_on(GOOD, clip=1e9), trainer_on(GOOD, clip=0.125)
    norms = [run(t)[1][0].values.grad_norm for t in (free, clipped)]
    assert norms[0] == norms[1]
    assert norms[0] > 0.125
    first_moments = []
    for clip in (1e9, 0.125):
        trainer = trainer_on(GOOD, clip=clip)
        train_steps(trainer, Progress(), after_step=lambda _: None, stop=_after(1))
        moment = trainer.optimizer.state[trainer.model.lm_head.weight]["exp_avg"]
        first_moments.append(float(moment.norm()))
    ratio = first_moments[1] / first_moments[0]
    assert 0.99 * 0.125 / norms[0] < ratio < 0.125 / norms[0]


def test_the_ramp_makes_later_steps_larger() -> None:
    ramp = [{"from_tokens": 32, "tokens_per_step": 64}, {"from_tokens": 160, "tokens_per_step": 96}]
    batch = {"tokens_per_step": 16, "ramp": ramp, "micro_batch_rows": 4}
    _, outcomes = run(trainer_on(GOOD, batch=batch))
    assert [o.batch.num_rows for o in outcomes] == [1, 1, 4, 4]
    assert [o.progress.next_sample for o in outcomes] == [1, 2, 6, 10]


def test_a_stop_takes_effect_between_steps() -> None:
    trainer = trainer_on(GOOD)
    progress = train_steps(trainer, Progress(), after_step=lambda _: None, stop=_after(3))
    assert (progress.step, progress.next_sample) == (3, 6)
