"""A server whose model lies on two ranks, and a first rank that breaks a step off."""

import gc
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from parallel_generation import PROMPTS, byte_tokenizer, model_of

from sevenfold.engine.llm import LLM
from sevenfold.engine.sampling import SamplingParams
from sevenfold.engine.sizing import size_engine
from sevenfold.engine.tensor_parallel import LeadingWorker
from sevenfold.engine.text_model import TextModel
from sevenfold.engine.worker import Worker
from sevenfold.models import HybridModel
from sevenfold.models.checkpoint import save_model
from sevenfold.server import BatchingEngine

GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


class Alone:
    """Ranks of which the others hear everything and do nothing."""

    size = 2

    def __init__(self, model: HybridModel) -> None:
        self.model, self.told, self.closed = model, [], 0

    def lead(self, plan: object, config: object) -> LeadingWorker:
        channel = SimpleNamespace(send=self.told.append)
        return LeadingWorker(self.model, plan, config, channel)

    def close(self) -> None:
        self.closed += 1


def test_after_a_step_that_was_broken_off_no_other_is_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("lf", False)
    ranks = Alone(model)
    llm = LLM(TextModel(model, byte_tokenizer(), ranks), memory_bytes=4 << 20)
    llm.generate(PROMPTS, GREEDY)
    told = len(ranks.told)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)
    assert len(ranks.told) == told + 1
    with pytest.raises(RuntimeError, match="all ranks must take every step, but this one broke"):
        llm.generate(PROMPTS, GREEDY)
    assert len(ranks.told) == told + 1  # they would not hear it


def test_a_server_holds_its_ranks_and_ends_them() -> None:
    model = model_of("lf", False)
    ranks = Alone(model)
    plan, limits = size_engine(model, budget_bytes=4 << 20)
    engine = BatchingEngine(TextModel(model, byte_tokenizer(), ranks), "two", plan, limits)
    assert ranks in gc.get_referents(engine.__dict__)
    assert not ranks.closed
    engine.close()
    assert ranks.closed == 1


@pytest.mark.slow
def test_the_program_serves_a_model_on_two_ranks(tmp_path: Path) -> None:
    save_model(model_of("lfs", True), tmp_path / "model")
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-c", "from sevenfold.cli.main import main; main()"]
    options = ["--tensor-parallel", "2", "--port", str(port), "--memory-gib", "0.05"]
    serve = subprocess.Popen([*program, "serve", str(tmp_path / "model"), *options])
    try:
        body = {"model": "model", "prompt": "grey herons", "max_tokens": 4, "temperature": 0}
        answer = asked(port, body, until=time.monotonic() + 120)
        assert answer["usage"]["completion_tokens"] >= 1
        serve.send_signal(signal.SIGTERM)
        assert serve.wait(60) == 0
    finally:
        serve.kill()
        serve.wait()


def asked(port: int, body: dict, *, until: float) -> dict:
    """The answer of a server that may not be ready yet."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
