import math

import pytest

from sevenfold.config import ConfigError, parse_config
from sevenfold.optim import ScheduleConfig, lr_multiplier


def multipliers(num_steps: int, **values) -> list[float]:
    schedule = parse_config(ScheduleConfig, values, "test")
    return [lr_multiplier(schedule, step, num_steps) for step in range(num_steps)]


def test_warm_up_rises_by_equal_steps_to_one() -> None:
    assert multipliers(6, kind="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_one_through_the_middle_to_its_floor() -> None:
    found = multipliers(8, kind="cosine", min_ratio=0.5)
    assert found[0] == 1.0
    assert found[4] == 0.75
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0.5 + 0.25 * (1 + math.cos(math.pi * 7 / 8))


def test_cosine_takes_a_tenth_as_its_floor() -> None:
    assert multipliers(4, kind="cosine") == multipliers(4, kind="cosine", min_ratio=0.1)


@pytest.mark.parametrize(
    ("options", "decay"),
    [
        ({"decay_shape": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"decay_shape": "linear", "min_ratio": 0.5}, [1.0, 0.875, 0.75, 0.625]),
        ({"decay_shape": "exponential", "min_ratio": 0.0625}, [1.0, 0.5, 0.25, 0.125]),
        ({"decay_shape": "1-sqrt"}, [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
        ({}, [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
    ],
)
def test_wsd_warms_up_holds_and_decays(options: dict, decay: list[float]) -> None:
    found = multipliers(9, kind="wsd", warmup_steps=2, decay_steps=4, **options)
    assert found == [0.5, 1.0, 1.0, 1.0, 1.0, *decay]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"kind": "constant", "min_ratio": 0.1},
            r"min_ratio must be left out with kind = 'constant', .* got 0\.1",
        ),
        (
            {"kind": "cosine", "decay_steps": 5},
            r"decay_steps must be left out with kind = 'cosine', .* got 5",
        ),
        (
            {"kind": "cosine", "decay_shape": "linear"},
            r"decay_shape must be left out with kind = 'cosine', .* got 'linear'",
        ),
        ({"kind": "wsd"}, r"decay_steps must be given with kind = 'wsd', got none"),
        (
            {"kind": "wsd", "decay_steps": 5, "decay_shape": "exponential"},
            r"min_ratio must be above 0 with decay_shape = 'exponential', got None",
        ),
        ({"kind": "wsd", "decay_step": 5}, "decay_step is not a known key; did you mean decay_st"),
    ],
)
def test_an_option_without_effect_or_meaning_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(ScheduleConfig, values, "test")


def test_a_schedule_longer_than_the_run_is_refused() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=6, decay_steps=5)
    schedule.check_fits(11)
    with pytest.raises(ConfigError, match=r"must not exceed the run's 10 steps, got 11"):
        schedule.check_fits(10)
