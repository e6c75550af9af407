"""A tiny checkpoint, and servers of it and routers as programs of their own on loopback."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from server_helpers import make_llm

from sevenfold.models.checkpoint import save_model

PROGRAM = (sys.executable, "-c", "from sevenfold.cli.main import main; main()")
START_S = 300.0  # on a machine that does other work as well
STOP_S = 60.0


@dataclass(frozen=True)
class Program:
    """A program that listens, and where."""

    url: str
    process: subprocess.Popen

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait(STOP_S)


def save_tiny(folder: Path) -> Path:
    """A checkpoint of the tests' tiny model."""
    llm = make_llm()
    save_model(llm.model, folder)
    llm.tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def wait_until(condition: Callable[[], bool], seconds: float = START_S) -> None:
    """Ask again and again until something holds.

    Raises:
        TimeoutError: it does not come to hold.
    """
    end_s = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError(f"it must come to hold within {seconds:g} s")
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Whether a URL answers with 200."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def serving(checkpoint: Path, *options: str, port: int | None = None) -> Iterator[Program]:
    """A server of a checkpoint, ended with the block."""
    port = port or free_port()
    command = (*PROGRAM, "serve", str(checkpoint), "--port", str(port), *options)
    with listening_at(command, port, "/health") as program:
        yield program


@contextmanager
def listening_at(command: Sequence[str], port: int, path: str) -> Iterator[Program]:
    """A program that answers 200 at a path of a port of loopback, ended with the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    program = Program(f"http://127.0.0.1:{port}", process)
    try:
        wait_until(lambda: process.poll() is not None or answers(program.url + path))
        if process.poll() is not None:
            raise RuntimeError(f"{command[0]} must go on, got exit code {process.returncode}")
        yield program
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            program.kill()
