"""Signs of life of every rank, and who is missing when there are none.

Each rank writes what it does, at most once a second, to heartbeats/rank-N.json in the run's folder.
A thread beside it looks at its own last sign; once that is too old, the thread reads everybody's.
Ranks that wait for others say so, and ranks that the others wait for do not: those are named.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from sevenfold.train.config import GuardSection

HEARTBEATS = "heartbeats"
STALLS_FILE = "stalls.jsonl"
WAITS = "waits for other ranks"
# The exit code of a process that ends because nothing moves: a temporary failure (sysexits.h).
EXIT_STALLED = 75

_WRITE_EVERY_S = 1.0
_LOOKS = 4  # at the clock in stall_s


class Pulse(Protocol):
    """What the loop tells; a run without a guard's stall_s tells nobody."""

    def beat(self, doing: str, step: int | None = None) -> None:
        """Say what this rank begins to do, and at which step where that is new."""
        ...


class _Silent:
    def beat(self, doing: str, step: int | None = None) -> None:
        """Do nothing."""


SILENT = _Silent()


@dataclass(frozen=True)
class Sign:
    """What a rank did last: since is seconds since the epoch."""

    rank: int
    host: str
    step: int
    doing: str
    since: float


class Heart:
    """This rank's signs of life, in memory at once and on disk at most once a second.

    Args:
        folder: of all ranks' files; it exists.
        rank: this one.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._written = folder, 0.0
        self.sign = Sign(rank, socket.gethostname(), 0, "starts", time.time())
        self.write()

    def beat(self, doing: str, step: int | None = None) -> None:
        """Say what this rank begins to do."""
        before = self.sign
        step = before.step if step is None else step
        self.sign = Sign(before.rank, before.host, step, doing, time.time())
        if self.sign.since - self._written >= _WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Put the last sign where others see it."""
        file = self._folder / f"rank-{self.sign.rank}.json"
        staging = file.with_name(f".{file.name}.tmp")
        try:
            staging.write_text(json.dumps(asdict(self.sign)), encoding="utf-8")
            staging.replace(file)
        except OSError:
            # A full disk ends the run where something would be lost; a sign of life is nothing.
            return
        self._written = time.time()


def missing_ranks(signs: Sequence[Sign]) -> list[Sign]:
    """Return the ranks that the others wait for: those that do not wait, the earliest step first.

    If all wait, it is the exchange itself that hangs, and those of the earliest step are named.
    """
    busy = [sign for sign in signs if sign.doing != WAITS]
    first = min((sign.step for sign in busy or signs), default=0)
    return [sign for sign in busy or signs if sign.step == first]


def read_signs(folder: Path) -> list[Sign]:
    """Return every rank's last sign of life, by rank."""
    texts = [file.read_text(encoding="utf-8") for file in folder.glob("rank-*.json")]
    return sorted((Sign(**json.loads(text)) for text in texts), key=lambda sign: sign.rank)


@contextmanager
def watched(
    out: Path,
    rank: int,
    guard: GuardSection,
    end_process: Callable[[int], None] = os._exit,
) -> Iterator[Pulse]:
    """Watch a run while it lasts, if guard.stall_s asks for it.

    Args:
        out: the run directory.
        rank: this process.
        guard: after how long to report, and to end.
        end_process: called with an exit code; nothing that waits in an exchange can be woken.

    Yields:
        What the loop tells.
    """
    if guard.stall_s is None:
        yield SILENT
        return
    folder = out / HEARTBEATS
    folder.mkdir(parents=True, exist_ok=True)
    heart, ended = Heart(folder, rank), threading.Event()
    arguments = (heart, out, guard.stall_s, guard.exit_stalled_s, ended, end_process)
    watch = threading.Thread(target=_watch, args=arguments, daemon=True)
    watch.start()
    try:
        yield heart
    finally:
        ended.set()
        watch.join()


def _watch(
    heart: Heart,
    out: Path,
    stall_s: float,
    exit_stalled_s: float | None,
    ended: threading.Event,
    end_process: Callable[[int], None],
) -> None:
    reported: Sign | None = None
    while not ended.wait(stall_s / _LOOKS):
        sign, waited_s = heart.sign, time.time() - heart.sign.since
        if waited_s < stall_s:
            continue
        if sign is not reported:
            heart.write()
            _report(out, sign, waited_s)
            reported = sign
        if exit_stalled_s is not None and waited_s >= exit_stalled_s:
            end_process(EXIT_STALLED)
            return


def _report(out: Path, sign: Sign, waited_s: float) -> None:
    missing = missing_ranks(read_signs(out / HEARTBEATS))
    line = {
        "time": time.time(),
        "rank": sign.rank,
        "step": sign.step,
        "doing": sign.doing,
        "waited_s": waited_s,
        "waits_for": [asdict(one) for one in missing],
    }
    with (out / STALLS_FILE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
