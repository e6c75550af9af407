"""The chat page in a real headless Chromium, driven through its debugging pipe."""

import base64
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_helpers import KEY, ScriptedEngine, listening

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# Chromium is no Python package, and so no part of the pinned environment.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, as `apt-get install chromium`"),
]
ANSWER = "<think>hm</think>Nine <b>grey</b> herons & a river."
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
FLAGS += " --disable-background-networking --disable-component-update --window-size=1000,700"


class Page:
    """One page of a browser; commands are those of the DevTools protocol."""

    def __init__(self, send_fd: int, receive_fd: int) -> None:
        self._send, self._receive = send_fd, receive_fd
        self._number, self._buffer, self._session = 0, b"", None
        self.complaints: list[str] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        said = {"id": self._number, "method": method, "params": params}
        said |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._send, json.dumps(said).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(message["params"]))

    def run(self, script: str) -> Any:
        made = self.command("Runtime.evaluate", expression=script, awaitPromise=True)
        assert "exceptionDetails" not in made, made
        return made["result"].get("value")

    def wait(self, condition: str) -> None:
        for _ in range(300):
            if self.run(condition):
                return
            time.sleep(0.1)
        raise AssertionError(f"it never came true: {condition}\n{self.complaints}")

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.command("Page.captureScreenshot")["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._receive, 1 << 16)
            assert piece, "the browser has ended"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    theirs_in, send = os.pipe()
    receive, theirs_out = os.pipe()
    command = f"exec {CHROMIUM} {FLAGS} --remote-debugging-pipe --user-data-dir={tmp_path}/profile"
    process = subprocess.Popen(
        ["bash", "-c", f"{command} 3<&{theirs_in} 4>&{theirs_out}"],
        pass_fds=(theirs_in, theirs_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(send, receive)
    finally:
        process.terminate()
        process.wait(20)
        os.close(send)
        os.close(receive)


def ask(page: Page, text: str) -> None:
    page.run(f"byId('input').value = {json.dumps(text)}; byId('form').requestSubmit(); 0")


NUMBERS = "[...document.querySelectorAll('.numbers')].map((e) => e.textContent).join('|')"
ANSWERS = "[...document.querySelectorAll('.assistant .text')].map((e) => e.textContent)"


def test_a_conversation(page: Page, tmp_path: Path) -> None:
    engine = ScriptedEngine(ANSWER, wait_s=0.02)
    with listening(engine) as url:
        page.command("Page.navigate", url=url.replace("//", f"//anyone:{KEY.replace(' ', '%20')}@"))
        page.wait("document.readyState === 'complete' && typeof byId === 'function'")
        page.wait("byId('model').textContent === 'scripted'")
        assert page.run("byId('state').textContent") == "context of 512 tokens"
        ask(page, "What do you see?")
        page.wait("!byId('stop').hidden")
        page.wait(f"{NUMBERS}.includes('tokens/s')")
        said = "Nine <b>grey</b> herons & a river."
        assert page.run(f"{ANSWERS}.join('|')") == said
        assert page.run("document.querySelectorAll('.text b').length") == 0
        assert page.run("document.querySelector('.assistant details div').textContent") == "hm"
        numbers = page.run(NUMBERS)
        assert "prompt tokens, 3 cached" in numbers
        assert f"{len(ANSWER)} new" in numbers
        assert "memory: kv 7.00 B" in numbers
        used = page.run("byId('state').textContent")
        assert re.fullmatch(r"context \d+ of 512 tokens", used)
        page.picture(tmp_path / "page.png")

        page.command("Page.reload")
        page.wait("document.readyState === 'complete' && typeof byId === 'function'")
        page.wait("byId('model').textContent === 'scripted'")
        assert page.run(f"{ANSWERS}.join('|')") == said
        assert page.run(NUMBERS) == numbers
        assert page.run("byId('state').textContent") == used
        ask(page, "And now?")
        page.wait(f"{ANSWERS}.length === 2 && byId('stop').hidden && {ANSWERS}[1].length > 20")
        prompt = engine.tokenizer.decode(list(engine.asked[-1].prompt))
        assert prompt == (f"User: What do you see?\nAssistant: {said}\nUser: And now?\nAssistant:")

        engine.stall_after = 20
        ask(page, "Stop.")
        page.wait(f"{ANSWERS}.length === 3 && {ANSWERS}[2].length > 0")
        page.run("byId('stop').click()")
        page.wait("byId('stop').hidden")
        for _ in range(100):
            if engine.under_way == 0:
                break
            time.sleep(0.05)
        assert engine.under_way == 0
        page.run("byId('clear').click()")
        assert page.run("document.querySelectorAll('.message').length") == 0
        assert page.run("document.querySelector('#empty') !== null")
        page.run("byId('max').value = 100000; 0")
        ask(page, "Too much.")
        page.wait(
            "document.querySelector('.assistant .error').textContent.includes('of 512 tokens')"
        )
    # The refusal above is the only thing that the browser had to say.
    assert [one for one in page.complaints if "400 (Bad Request)" not in one] == []
