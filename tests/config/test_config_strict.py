"""Strict validation: every mistake is named with its place and its remedy."""

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from sevenfold.config import ConfigError, StrictModel, merge_tables, nearest_name, parse_config
from sevenfold.config import unknown_name as unknown


class Schedule(StrictModel):
    kind: Literal["cosine", "linear"]
    warmup_steps: int = 0


class Item(StrictModel):
    name: str
    schedule: Schedule | None = None


class Run(StrictModel):
    steps: Annotated[int, Field(ge=1)]
    rate: float = 0.5
    sizes: tuple[int, ...] = ()
    folder: Path | None = None
    schedule: Schedule | None = None
    items: tuple[Item, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "Run":
        if self.rate > self.steps:
            raise ValueError(f"rate must not exceed steps = {self.steps}, got {self.rate}")
        return self


def test_values_of_toml_become_the_declared_types() -> None:
    schedule = {"kind": "cosine", "warmup_steps": 2}
    values = {"steps": 3, "rate": 1, "sizes": [1, 2], "folder": "a/b", "schedule": schedule}
    run = parse_config(Run, values | {"items": [{"name": "x"}]}, "run.toml")
    assert run == Run(
        steps=3,
        rate=1.0,
        sizes=(1, 2),
        folder=Path("a/b"),
        schedule=Schedule(kind="cosine", warmup_steps=2),
        items=(Item(name="x"),),
    )


FAULTS = [
    ({"step": 1}, "step is not a known key; did you mean steps?"),
    ({"zzz": 1}, "zzz is not a known key; known: steps, rate, sizes, folder, schedule, items"),
    ({}, "steps must be given"),
    ({"steps": "3"}, "steps must be valid: Input should be a valid integer, got '3'"),
    ({"steps": 3.0}, "steps must be valid: Input should be a valid integer, got 3.0"),
    ({"steps": True}, "steps must be valid: Input should be a valid integer, got True"),
    ({"steps": 0}, "steps must be valid: Input should be greater than or equal to 1, got 0"),
    ({"steps": 1, "sizes": [1, "a"]}, "sizes.1 must be valid: Input should be a valid integer"),
    ({"steps": 1, "sizes": 4}, "sizes must be valid: Input should be a valid"),
    (
        {"steps": 1, "rate": "fast"},
        "rate must be valid: Input should be a valid number, got 'fast'",
    ),
    ({"steps": 1, "schedule": {}}, "schedule.kind must be given"),
    (
        {"steps": 1, "schedule": {"kind": "cosin"}},
        "schedule.kind must be valid: Input should be 'cosine' or 'linear', got 'cosin'",
    ),
    (
        {"steps": 1, "schedule": {"kind": "linear", "warmup": 4}},
        "schedule.warmup is not a known key; did you mean schedule.warmup_steps?",
    ),
    (
        {"steps": 1, "items": [{"name": "x"}, {"name": "y", "nam": 1}]},
        "items.1.nam is not a known key; did you mean items.1.name?",
    ),
    ({"steps": 1, "rate": 1.5}, "run.toml: rate must not exceed steps = 1, got 1.5"),
]


@pytest.mark.parametrize(("values", "message"), FAULTS, ids=lambda x: str(x)[:50])
def test_each_fault_is_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse_config(Run, values, "run.toml")
    assert str(caught.value).startswith("run.toml: ")


def test_a_key_nested_below_a_list_gets_the_hint_of_its_own_table() -> None:
    values = {"steps": 1, "items": [{"name": "x", "schedule": {"kind": "linear", "warmup": 4}}]}
    message = (
        "items.0.schedule.warmup is not a known key; did you mean items.0.schedule.warmup_step"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(Run, values, "run.toml")


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(Run, {"rat": 1, "sizes": 2}, "run.toml")
    parts = str(caught.value).removeprefix("run.toml: ").split("; ")
    assert [part.split()[0] for part in parts] == ["steps", "sizes", "rat", "did"]


def test_configurations_are_frozen_and_never_convert() -> None:
    run = Run(steps=1)
    with pytest.raises(ValidationError, match="Instance is frozen"):
        run.steps = 2
    with pytest.raises(ConfigError, match=r"Run: steps must be valid: .* valid integer, got '1'"):
        Run(steps="1")


def test_a_call_names_its_faults_as_a_file_does() -> None:
    rule = "Run: steps must be given; rat is not a known key; did you mean rate?"
    with pytest.raises(ConfigError, match=re.escape(rule)):
        Run(rat=1)
    parsed = parse_config(Run, {"steps": 3}, "run.toml")
    assert parsed == Run(steps=3)


def test_nearest_name() -> None:
    known = ["learning_rate", "weight_decay"]
    assert nearest_name("learning_rte", known) == "learning_rate"
    assert nearest_name("betas", known) is None
    assert unknown("preset", "weight_decy", known) == (
        "preset must be a known name, got 'weight_decy'; did you mean 'weight_decay'?"
    )
    assert unknown("preset", "zzz", ["b", "a"]) == (
        "preset must be a known name, got 'zzz'; known: a, b"
    )


def test_tables_merge_key_by_key() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": 3}
    top = {"a": {"y": {"w": 4}}, "b": [5], "c": {"d": 6}}
    merged = merge_tables(base, top)
    assert merged == {"a": {"x": 1, "y": {"z": 2, "w": 4}}, "b": [5], "c": {"d": 6}}
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": 3}
    assert merge_tables({"a": {"x": 1}}, {"a": 2}) == {"a": 2}
