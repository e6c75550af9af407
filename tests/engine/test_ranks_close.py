"""Ranks end together, and whoever does not end is ended."""

import subprocess
import sys
import tempfile
from threading import Event
from types import SimpleNamespace

import pytest

from sevenfold.engine.tensor_parallel import joining as joining_module
from sevenfold.engine.tensor_parallel import ranks as ranks_module
from sevenfold.engine.tensor_parallel.joining import Joined
from sevenfold.engine.tensor_parallel.ranks import Ranks


class Leaving:
    """In place of Joined: notes who left with which worker."""

    def __init__(self) -> None:
        self.began, self.workers, self.abandoned = Event(), [], 0

    def leave(self, worker: object) -> None:
        self.workers.append(worker)
        self.began.set()

    def abandon(self) -> None:
        self.abandoned += 1


class LeavesTogether:
    """A process that ends once the first rank is leaving, as one does that NCCL keeps."""

    pid = 0

    def __init__(self, leaving: Leaving) -> None:
        self._leaving, self.killed = leaving, 0

    def wait(self, timeout: float | None = None) -> None:
        if not self._leaving.began.wait(timeout):
            raise subprocess.TimeoutExpired("rank", timeout or 0)

    def kill(self) -> None:
        self.killed += 1


def ranks_of(leaving: Leaving, process: object, stop: object = lambda: None) -> Ranks:
    ranks = Ranks(leaving, [process], tempfile.TemporaryDirectory(prefix="test-ranks-"))
    ranks._worker = SimpleNamespace(stop=stop, has_left=False)
    return ranks


def test_the_first_rank_leaves_while_it_waits_for_the_others() -> None:
    leaving = Leaving()
    ranks = ranks_of(leaving, LeavesTogether(leaving))
    ranks.close()
    assert leaving.workers == [ranks._worker]
    ranks.close()
    assert len(leaving.workers) == 1


def test_a_rank_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_END_S", 0.1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ranks_of(Leaving(), process).close()
        assert process.returncode is not None
        assert process.returncode < 0


def test_a_first_rank_that_cannot_leave_does_not_keep_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks_module, "_END_S", 0.1)
    leaving, never = Leaving(), Event()
    process = LeavesTogether(leaving)
    leaving.began.set()
    ranks = ranks_of(leaving, process, stop=never.wait)
    ranks.close()
    assert leaving.workers == []
    assert process.killed
    never.set()


def test_a_rank_that_has_ended_is_no_error() -> None:
    def stop() -> None:
        raise RuntimeError("connection closed by peer")

    leaving = Leaving()
    ranks_of(leaving, LeavesTogether(leaving), stop).close()
    assert len(leaving.workers) == 1


def test_ranks_that_wait_in_a_warm_up_are_killed_at_once() -> None:
    """They would hear nothing: this rank has given it up."""
    leaving = Leaving()
    process = LeavesTogether(leaving)
    killed, process.kill = [], lambda: killed.append(leaving.began.set())
    ranks = ranks_of(leaving, process)
    ranks._worker.has_left = True
    ranks.close()
    assert len(killed) == 1
    # Nor would they answer: the group is left without them.
    assert (leaving.abandoned, leaving.workers) == (1, [])


def test_recordings_go_before_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL destroys no communicator that a graph still uses."""
    order: list[str] = []
    group = SimpleNamespace(destroy_process_group=lambda: order.append("group"))
    monkeypatch.setattr(joining_module, "dist", group)
    joined = Joined(SimpleNamespace(), SimpleNamespace())
    joined.leave(SimpleNamespace(close=lambda: order.append("worker")))
    assert order == ["worker", "group"]
