"""Stopping a run by a signal, at the end of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class StopRequest:
    """Whether a signal has asked the run to stop, and which."""

    received: signal.Signals | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request that the loop reads between steps.

    The second SIGINT interrupts at once. Only the main thread may handle signals: in another one
    they keep their meaning, and the request never comes.

    Yields:
        The request.
    """
    request = StopRequest()

    def on_signal(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and request.received is not None:
            raise KeyboardInterrupt
        request.received = signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
