"""What only a GPU shows of the warm-up: kernels compiled beforehand, and memory as it was."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_helpers import MOE
from test_device_gpu import GPU, gpu_model
from test_engine import build, prompts, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.engine.device import graph_bytes, prefill_sizes
from sevenfold.models import HybridModel

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*has no tuning")]
LENGTHS = [2, 70, 33, 16, 130, 300]
LIMITS = {"slabs": 140, "max_step_tokens": 1000, "max_running": 5}


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The kernels that Triton makes ready from now on: names, and what they are compiled for."""
    from triton import knobs

    kernels: list[str] = []

    def note(**known: Any) -> None:
        kernels.append(f"{known['fn'].module} {known['fn'].name} {known['key']}")

    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = note
        yield kernels


def model_of(mix: str) -> HybridModel:
    fields = {"moe": MOE} if mix == "moe" else {}
    return gpu_model("llf" if mix == "moe" else mix, **fields)


@pytest.mark.parametrize("mix", ["lsf", "lllf", "moe"])
def test_no_request_waits_for_a_kernel_or_a_recording(
    mix: str, tokenizer: Tokenizer, compiled: list[str]
) -> None:
    engine = build(model_of(mix), tokenizer, **LIMITS)
    engine.warm_up()
    runner = engine._worker.runner
    recorded = [len(x._recorder.recorded) for x in (runner._graphs, runner._prefills)]
    compiled.clear()
    for n, text in enumerate(prompts(0, LENGTHS)):
        submit(engine, str(n), text, 9)
        run(engine)
    for crowd in ((2, 70, 33), (100, 33), (16, 16), (1, 1, 1, 1), LENGTHS[:5], (64,) * 3, (300, 5)):
        for n, text in enumerate(prompts(sum(crowd), list(crowd))):
            submit(engine, f"{n} of {crowd}", text, 9)
        run(engine)
    assert not compiled, "\n".join(compiled)
    assert recorded == [len(x._recorder.recorded) for x in (runner._graphs, runner._prefills)]


def test_tokens_are_those_of_an_engine_that_was_not_warmed_up(tokenizer: Tokenizer) -> None:
    model, found = model_of("lllf"), []
    for warms_up in (False, True):
        engine = build(model, tokenizer, **LIMITS)
        if warms_up:
            engine.warm_up()
        events = {}
        for n, text in enumerate(prompts(0, LENGTHS)):
            submit(engine, str(n), text, 12)
            events |= run(engine)
        found.append({name: tokens(one) for name, one in events.items()})
    assert found[0] == found[1]


def test_it_takes_no_more_memory_than_was_set_aside(tokenizer: Tokenizer) -> None:
    model = gpu_model("lsf", hidden_size=512, num_attention_heads=16, vocab_size=4000)
    # Kernels are loaded, and libraries have what they keep.
    build(model, tokenizer, **LIMITS).warm_up()
    engine = build(model, tokenizer, **LIMITS)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(GPU)
    engine.warm_up()
    taken = torch.cuda.memory_reserved(GPU) - before
    largest = prefill_sizes(model.config)[-1]
    assert taken <= graph_bytes(model.config, 5, largest, element_bytes=2)
