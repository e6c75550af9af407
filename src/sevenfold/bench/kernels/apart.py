"""Work in a process of its own: what breaks there ends there, and the next item starts anew."""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
_EXIT_S = 10


@dataclass(frozen=True)
class Failure:
    """What became of an item that gave no result."""

    reason: str


class Apart:
    """A process that opens its work once and then answers one item at a time."""

    def __init__(self, opener: Callable[[], Callable[[Any], Any]]) -> None:
        """Start the process at once, so that what it imports loads while others are busy.

        Args:
            opener: called there; returns the function that answers items. Importable by name.
        """
        self._opener = opener
        self._start()

    def ask(self, item: object, timeout_s: float) -> Any:
        """Return the answer to an item, or a Failure.

        The item after a failure meets a new process: CUDA does not outlive its errors.
        """
        if not self._process.is_alive():
            self._start()
        try:
            self._connection.send(item)
            if self._connection.poll(timeout_s):
                answer = self._connection.recv()
            else:
                answer = Failure(f"no answer in {timeout_s:.0f} s")
        except (EOFError, OSError):
            self._process.join(_EXIT_S)
            answer = Failure(f"the process died, exit code {self._process.exitcode}")
        if isinstance(answer, Failure):
            self._end(0)
        return answer

    def close(self) -> None:
        """End the process."""
        self._end(_EXIT_S)

    def _start(self) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(self._opener, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that its death ends the pipe

    def _end(self, patience_s: float) -> None:
        self._connection.close()
        self._process.join(patience_s)
        self._process.kill()
        self._process.join()


def _serve(opener: Callable[[], Callable[[Any], Any]], connection: Connection) -> None:
    work = _tried(opener)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(work if isinstance(work, Failure) else _tried(partial(work, item)))


def _tried(call: Callable[[], Any]) -> Any:
    # A peer may raise anything; what it raised is its row in the table.
    try:
        return call()
    except Exception as error:
        lines = str(error).strip().splitlines()
        return Failure(f"{type(error).__name__}: {lines[0] if lines else ''}"[:300])
