"""`sevenfold serve`: it serves until a signal, and says in one line why it does not."""

import asyncio
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from cli_helpers import TinyRun, exit_code, run_cli
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from sevenfold import server
from sevenfold.engine.speculation import DraftModelConfig, PromptLookupConfig

FEWER_BITS = ("--states", "int8", "--snapshots", "auto", "--weights", "int8")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_it_serves_until_a_signal_and_ends_what_is_under_way(tiny_run: TinyRun) -> None:
    script = "from sevenfold.cli.main import main; main()"
    command = [sys.executable, "-c", script, "serve", str(tiny_run.checkpoint), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--model-name", "tiny", "--memory-gib", "0.05", *FEWER_BITS],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        plan, line = [], ""
        for line in lines:
            if line.startswith("tiny at"):
                break
            plan.append(line.split("  ")[0])
        assert {"memory", "longest context", "cacheable prefix"} <= set(plan)
        found = re.fullmatch(r"tiny at (http://127\.0\.0\.1:\d+) \(chat at /, .*\)\n", line)
        assert found is not None, line
        body = {"prompt": "the river", "max_tokens": 60, "ignore_eos": True, "stream": True}
        url = f"{found[1]}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = "\n".join(lines)
        assert '"finish_reason": "length"' in rest
        assert rest.rstrip().endswith("data: [DONE]")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_port_in_use(
    tiny_run: TinyRun, taken_port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("serve", tiny_run.checkpoint, "--port", str(taken_port)) == 1
    said = f"port must be free, got {taken_port} on 127.0.0.1, which another program uses"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--host", "0.0.0.0"], 2, "api_keys must be given to listen beyond this machine"),
        (["--host", "203.0.113.7"], 2, "api_keys must be given to listen beyond this machine"),
        (["--port", "99999"], 2, "port must be valid"),
        (["--max-requests", "0"], 2, "max_requests must be valid"),
        (["--dtype", "int3"], 2, "dtype must be one of"),
        (["--device", "abacus"], 2, "device must be cpu, or cuda where there is a GPU"),
        (["--snapshots", "int3"], 2, "snapshots must be"),
        (["--draft-tokens", "16"], 2, "draft_tokens must be"),
        (["--draft-branches", "2"], 2, "draft_branches must be left out without drafts"),
        (["--draft-tokens", "2", "--draft-branches", "3"], 2, "branches must be at most draft_tok"),
        (
            ["--draft-memory-gib", "nan"],
            2,
            "draft_memory_gib must be 0 or more and finite, got nan",
        ),
        (["--draft-memory-gib", "1"], 2, "draft_memory_gib must be left out without draft_model"),
        (["--draft-model", "/nowhere"], 1, "/nowhere must be a checkpoint folder"),
        (["--states", "bf16", "--memory-gib", "0.05"], 2, "state_dtype must not be bf16 where"),
        (["--weights", "int3"], 2, "weights must be"),
        (["--api-keys-file", "/nowhere"], 1, "/nowhere must be a readable file, got: No such file"),
        (["--api-keys-file", "/"], 1, "/ must be a readable file, got: Is a directory"),
        (["--memory-gib", "nan"], 2, "memory_gib must be 0 or more and finite, got nan"),
        (["--memory-gib", "inf"], 2, "memory_gib must be 0 or more and finite, got inf"),
        (["--memory-gib", "-1"], 2, "memory_gib must be 0 or more and finite, got -1"),
        (["--host-memory-gib", "-inf"], 2, "host_memory_gib must be 0 or more and finite"),
        (["--memory-gib", "1e9"], 2, "memory_gib and host_memory_gib must fit into free memory"),
        (["--memory-gib", "1e-5"], 2, "budget_bytes must hold one request of 1 tokens"),
        (["--model-name", " "], 2, "model_name must not be empty, got ' '"),
        (["--memoy-gib", "1"], 2, "No such option: --memoy-gib"),
    ],
)
def test_options_that_break_a_rule(
    tiny_run: TinyRun,
    options: list[str],
    code: int,
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert exit_code("serve", tiny_run.checkpoint, "--port", "0", *options) == code
    error = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert said in error
    assert "Traceback" not in error


def test_keys_that_are_no_text(
    tiny_run: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xff" * 40)
    assert exit_code("serve", tiny_run.checkpoint, "--api-keys-file", file, "--port", "0") == 2
    assert "keys must be a text file in UTF-8, got other bytes" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "\n", "short\n", "long enough for a key\nshort\n"])
def test_keys_that_are_none(
    tiny_run: TinyRun, tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    assert exit_code("serve", tiny_run.checkpoint, "--api-keys-file", file, "--port", "0") == 2
    error = capfd.readouterr().err
    assert "must hold an API key of 16 characters or more on each line" in error
    assert "short\n" not in error


def test_a_checkpoint_that_is_broken(
    tiny_run: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_run.checkpoint.iterdir():
        content = file.read_bytes()
        cut = file.suffix == ".safetensors"
        (broken / file.name).write_bytes(content[: len(content) // 2] if cut else content)
    assert exit_code("serve", broken, "--port", "0") == 1
    assert "safetensors" in capfd.readouterr().err
    assert exit_code("serve", tmp_path / "missing", "--port", "0") == 1
    assert "missing must be a checkpoint folder" in capfd.readouterr().err
    assert exit_code("serve", tiny_run.checkpoint.parent, "--port", "0") == 1
    assert re.search(r"tokenizer\.json must exist .*/final has one", capfd.readouterr().err)
    template = tmp_path / "template"
    template.mkdir()
    for file in tiny_run.checkpoint.iterdir():
        (template / file.name).write_bytes(file.read_bytes())
    (template / "chat_template.jinja").write_text("{% for %}")
    assert exit_code("serve", template, "--port", "0") == 1
    assert "chat_template must be a Jinja template" in capfd.readouterr().err
    (template / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert exit_code("serve", template, "--port", "0") == 1
    said = capfd.readouterr()
    assert "chat_template.jinja must be text in UTF-8, got other bytes" in said.err
    assert "memory" not in said.out  # before the weights were read


def test_a_tokenizer_of_another_model(
    tiny_run: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tiny_run.checkpoint, tmp_path / "other")
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_tokens([f"word{n}" for n in range(10_000)])
    tokenizer.save(str(other / "tokenizer.json"))
    assert exit_code("serve", other, "--port", "0") == 1
    said = capfd.readouterr().err
    assert re.fullmatch(r"sevenfold: tokenizer must have at most the model's \d+ .*\n", said)


def test_weights_that_compute_nothing(
    tiny_run: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(tiny_run.checkpoint, tmp_path / "broken")
    [file] = broken.glob("*.safetensors")
    weights = load_file(file)
    weights["embed_tokens.weight"] *= float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    assert exit_code("serve", broken, "--port", "0", "--memory-gib", "0.05") == 1
    said = "broken must answer a first request: the model's logits are not finite"
    assert said in capfd.readouterr().err


def test_it_warms_up_unless_it_shall_be_ready_at_once(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def warm_up(engine: server.BatchingEngine, note: Callable[[str], None]) -> None:
        note("half way")

    def listen(app: server.ServerApp, settings: object, taken: object, first: Callable) -> None:
        asyncio.run(first())
        app.close()

    monkeypatch.setattr(server.BatchingEngine, "warm_up", warm_up)
    monkeypatch.setattr(server, "listen", listen)
    said = []
    gc.unfreeze()
    for options in ([], ["--no-warm-up"]):
        where = ("--port", "0", "--memory-gib", "0.05")
        assert exit_code("serve", tiny_run.checkpoint, *where, *options) == 0
        said.append(capfd.readouterr().out)
        assert gc.get_freeze_count() > 10_000, "a full collection walks past all that stays"
        gc.unfreeze()
    gc.freeze()  # as tests/conftest.py does
    assert "warming up: half way\nfinal at http://127.0.0.1:" in said[0]
    assert "warming up" not in said[1]
    assert "final at http://127.0.0.1:" in said[1]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the program gave each engine beside its model, memory and limits; none listens."""
    found = []
    engine = server.BatchingEngine

    def start(*parts: object, **options: object) -> server.BatchingEngine:
        found.append(options)
        return engine(*parts, **options)

    monkeypatch.setattr(server, "BatchingEngine", start)
    monkeypatch.setattr(server, "listen", lambda app, settings, taken, first: app.close())
    return found


def test_what_guesses(tiny_run: TinyRun, started: list[dict]) -> None:
    smaller = ("--draft-model", tiny_run.checkpoint, "--draft-memory-gib", "0.01")
    memory = ("--port", "0", "--memory-gib", "0.05")
    for options in ((), ("--draft-tokens", "4", "--draft-branches", "2"), smaller):
        assert exit_code("serve", tiny_run.checkpoint, *memory, *options) == 0
    none, copied, decoded = started
    assert (none["speculation"], none["draft"]) == (None, None)
    assert copied["speculation"] == PromptLookupConfig(draft_tokens=4, branches=2)
    assert copied["draft"] is None
    assert decoded["speculation"] == DraftModelConfig(memory_bytes=int(0.01 * 2**30))
    assert decoded["draft"].model.config.hidden_size == 16


def test_the_report_keeps_to_the_model_s_context(
    tiny_run: TinyRun, started: list[dict], capfd: pytest.CaptureFixture[str]
) -> None:
    memory = ("--port", "0", "--memory-gib", "0.05")
    assert exit_code("serve", tiny_run.checkpoint, *memory, "--batch-invariant") == 0
    said = capfd.readouterr().out
    assert "longest context     256 tokens\nat 256 tokens" in said
    assert "cacheable prefix    from 128 tokens" in said


def test_a_draft_model_that_does_not_suit(
    tiny_run: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tiny_run.checkpoint, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    memory = ("--port", "0", "--memory-gib", "0.05")
    assert exit_code("serve", tiny_run.checkpoint, *memory, "--draft-model", other) == 2
    assert "must have the model's tokens under the same ids" in capfd.readouterr().err
    itself = ("--draft-model", tiny_run.checkpoint)
    assert exit_code("serve", tiny_run.checkpoint, *memory, *itself) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "the draft model's memory must leave some of the budget to the model, got 536,8" in said


def test_help() -> None:
    result = run_cli("serve", "--help")
    assert result.exit_code == 0
    assert "--api-keys-file" in result.output


def serving(checkpoint: Path, port: int, **options) -> subprocess.Popen:
    script = "from sevenfold.cli.main import main; main()"
    command = [sys.executable, "-c", script, "serve", str(checkpoint), "--port", str(port)]
    return subprocess.Popen([*command, "--memory-gib", "0.05"], text=True, **options)


@pytest.mark.slow
def test_a_killed_server_starts_again_on_its_port(tiny_run: TinyRun) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    body = {"prompt": "the river", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    texts = []
    for kills in (True, False):
        process = serving(tiny_run.checkpoint, port, stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            assert any(line.startswith("final at") for line in process.stdout)
            url = f"http://127.0.0.1:{port}/v1/completions"
            if kills:
                with httpx.stream("POST", url, json=body | {"stream": True}, timeout=120) as said:
                    next(said.iter_lines())
                    process.kill()
                    assert process.wait(60) == -signal.SIGKILL
            else:
                texts.append(httpx.post(url, json=body, timeout=120).json()["choices"][0]["text"])
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    assert len(texts[0]) > 0


def test_a_full_disk_under_its_output(tiny_run: TinyRun) -> None:
    """Its output is all that the server writes, but for the cache of compiled loops."""
    buffered = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        pipes = {"stdout": full, "stderr": subprocess.PIPE}
        process = serving(tiny_run.checkpoint, 0, env=buffered, **pipes)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "No space left on device" in said
    assert "Traceback" not in said


# A start whose kernels take a second each, by two threads, and what they would take together: long.
SLOW_START = """
import os, time
from sevenfold.cli.main import main
from sevenfold.engine.worker import Worker, compiled_together

def compile(n):
    print("compiling", flush=True)
    time.sleep(1)

def rehearse(worker, runs, drafts):
    from triton.runtime._async_compile import active_mode
    with compiled_together(lambda: worker.is_stopping):
        for n in range(1000):
            active_mode.get().submit(n, lambda: compile(n), lambda kernel: None)
    worker._check_wanted()

Worker.has_first_times, Worker._rehearse = True, rehearse
main()
"""


def test_a_signal_gives_a_start_up(tiny_run: TinyRun) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-c", SLOW_START, "serve", str(tiny_run.checkpoint), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "--memory-gib", "0.05"], **pipes)
    try:
        assert "compiling\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGTERM)
        said, complaints = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert re.search(r"^warming up: given up after \d+\.\d s: the server is to stop$", said, re.M)
    assert "final at" not in said
    assert said.count("compiling") < 100
    assert complaints == ""
