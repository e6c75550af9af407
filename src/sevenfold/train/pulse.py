"""Signs of life of every rank, and who is missing when there are none.

The run says what it does; a thread beside it writes that to heartbeats/rank-N.json in the run's
folder where it is new, once a second, and looks where the run stands: in an exchange with other
ranks or not. Once a sign is too old the thread waits until every rank has written, and reads all.
Ranks that wait for others say so, and ranks that the others wait for do not: those are named.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

from sevenfold.train.config import GuardSection

HEARTBEATS = "heartbeats"
STALLS_FILE = "stalls.jsonl"
WAITS = "waits for other ranks"
# The exit code of a process that ends because nothing moves: a temporary failure (sysexits.h).
EXIT_STALLED = 75

_WRITE_EVERY_S = 1.0
_LOOKS = 4  # at the clock in stall_s
# Where a thread stands that waits for other ranks on the host: what calls the system to wait.
_EXCHANGES = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "torch/distributed/fsdp/_fully_shard/",
    "torch/distributed/pipelining/schedules.py",
)
# Of the package's own, functions of these names.
_OWN_EXCHANGES, _OWN_WAITS = "sevenfold/parallel/", ("finish", "wait")


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
    """What a rank did last: since is seconds since the epoch.

    in_exchange: whether it was seen to wait for other ranks meanwhile.
    """

    rank: int
    host: str
    step: int
    doing: str
    since: float
    in_exchange: bool = False

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks."""
        return self.in_exchange or self.doing == WAITS


class Heart:
    """This rank's signs of life: in memory at once, on disk when they are written.

    Args:
        folder: of all ranks' files; it exists.
        rank: this one, whose run goes in the thread that builds this.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._thread = folder, threading.get_ident()
        self._written: Sign | None = None
        self.sign = Sign(rank, socket.gethostname(), 0, "starts", time.time())
        self.write()

    def beat(self, doing: str, step: int | None = None) -> None:
        """Say what this rank begins to do."""
        before = self.sign
        step = before.step if step is None else step
        self.sign = Sign(before.rank, before.host, step, doing, time.time())

    def write(self) -> None:
        """Put the last sign where others see it, unless it is there."""
        frame = sys._current_frames().get(self._thread)
        sign = replace(self.sign, in_exchange=frame is not None and in_exchange(frame))
        if sign == self._written:
            return
        file = self._folder / f"rank-{sign.rank}.json"
        staging = file.with_name(f".{file.name}.tmp")
        try:
            staging.write_text(json.dumps(asdict(sign)), encoding="utf-8")
            staging.replace(file)
        except OSError:
            # A full disk ends the run where something would be lost; a sign of life is nothing.
            return
        self._written = sign


def in_exchange(frame: FrameType) -> bool:
    """Whether a thread that stands in a frame waits for other ranks."""
    at: FrameType | None = frame
    # An operator's wait is called through torch's own wrapper.
    while at is not None and at.f_code.co_filename.endswith("torch/_ops.py"):
        at = at.f_back
    if at is None:
        return False
    file = at.f_code.co_filename
    is_own = _OWN_EXCHANGES in file and at.f_code.co_name in _OWN_WAITS
    return is_own or any(part in file for part in _EXCHANGES)


def missing_ranks(signs: Sequence[Sign]) -> list[Sign]:
    """Return the ranks that the others wait for: those that do not wait, the earliest step first.

    If all wait, it is the exchange itself that hangs, and those of the earliest step are named.
    """
    busy = [sign for sign in signs if not sign.waits]
    first = min((sign.step for sign in busy or signs), default=0)
    return [sign for sign in busy or signs if sign.step == first]


def read_signs(folder: Path) -> list[Sign]:
    """Return every rank's last sign of life, by rank."""
    texts = [file.read_text(encoding="utf-8") for file in folder.glob("rank-*.json")]
    return sorted((Sign(**json.loads(text)) for text in texts), key=lambda sign: sign.rank)


def remove_signs(out: Path) -> None:
    """Remove the signs of an earlier start, which may have had more ranks; the first rank calls."""
    for file in (out / HEARTBEATS).glob("rank-*.json"):
        file.unlink()


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
    every_s = min(_WRITE_EVERY_S, stall_s / _LOOKS)
    while not ended.wait(every_s):
        heart.write()
        sign, waited_s = heart.sign, time.time() - heart.sign.since
        if waited_s < stall_s:
            continue
        if sign is not reported:
            # The others' threads, too, have seen by then where their runs stand.
            if ended.wait(2 * every_s) or heart.sign is not sign:
                continue
            _report(out, sign, time.time() - sign.since)
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
