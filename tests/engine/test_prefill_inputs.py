"""The pinned buffer of a recorded prefill is written when nothing reads it any more."""

import pytest
from device_helpers import FakeCapture, Places, new_runner, new_storage, prompt
from engine_helpers import tiny_model

from sevenfold.engine.cache import Fresh
from sevenfold.engine.device.prefill_inputs import PrefillInputs
from sevenfold.engine.device.staging import Staging
from sevenfold.engine.rows import Row


class Told:
    """A device's event that says what is asked of it."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def synchronize(self) -> None:
        self.events.append("waited")

    def record(self) -> None:
        self.events.append("noted")


def test_each_run_is_noted_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    made, copied = Staging.__init__, Staging.copy

    def told(self: Staging, *args: object) -> None:
        made(self, *args)
        self._copied = Told(events)

    def copy(self: Staging) -> None:
        events.append("copied")
        copied(self)

    monkeypatch.setattr(Staging, "__init__", told)
    monkeypatch.setattr(Staging, "copy", copy)
    shown = PrefillInputs._show

    def show(self: PrefillInputs, pages: list[int]) -> None:
        events.append("written")
        shown(self, pages)

    monkeypatch.setattr(PrefillInputs, "_show", show)
    model = tiny_model("lsf")
    storage = new_storage(model)
    runner, places = new_runner(model, storage, FakeCapture(), (1,), (8,)), Places(storage)
    row = Row(prompt(7, 1), 0, places.state(1), places.pages(0), {})
    runner.run([row])
    events.clear()
    runner.run([row])
    assert runner.run_readied(row, Fresh([], []), None) is not None
    assert events == ["waited", "written", "copied", "noted"] * 2
