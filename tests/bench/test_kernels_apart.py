"""Work apart: answers come back, and a failure of any kind is one answer, not the end."""

import os
import time
from collections.abc import Callable, Iterator

import pytest

from sevenfold.bench.kernels.apart import Apart, Failure

PATIENCE_S = 300  # for a process that starts on a busy machine


def open_counter() -> Callable[[str], object]:
    """Count the items since the process began; do what they say."""
    seen = []

    def work(item: str) -> object:
        seen.append(item)
        if item == "raise":
            raise ZeroDivisionError("first line\nsecond line")
        if item == "die":
            os._exit(7)
        if item == "sleep":
            time.sleep(PATIENCE_S)
        return os.getpid(), list(seen)

    return work


def open_nothing() -> Callable[[str], object]:
    raise ImportError("no such peer")


@pytest.fixture
def counter() -> Iterator[Apart]:
    apart = Apart(open_counter)
    yield apart
    apart.close()


def test_work_goes_on_after_each_kind_of_failure(counter: Apart) -> None:
    first, seen = counter.ask("a", PATIENCE_S)
    assert (first != os.getpid(), seen) == (True, ["a"])
    assert counter.ask("b", PATIENCE_S) == (first, ["a", "b"])
    assert counter.ask("raise", PATIENCE_S) == Failure("ZeroDivisionError: first line")
    second, seen = counter.ask("c", PATIENCE_S)
    assert (second != first, seen) == (True, ["c"])
    assert counter.ask("die", PATIENCE_S) == Failure("the process died, exit code 7")
    third, seen = counter.ask("d", PATIENCE_S)
    assert (third not in (first, second), seen) == (True, ["d"])
    assert counter.ask("sleep", 0.1) == Failure("no answer in 0 s")


def test_what_cannot_be_opened_says_so() -> None:
    apart = Apart(open_nothing)
    assert apart.ask("a", PATIENCE_S) == Failure("ImportError: no such peer")
    apart.close()
    apart.close()
