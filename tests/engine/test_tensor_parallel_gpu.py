"""Two ranks on two GPUs: recorded and as it comes, ahead, drafts; and that they end."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engine_helpers import MOE, tiny_model
from matrix_bf16 import tamed
from near_ties import Judge
from test_engine import prompts, run, submit, tokens
from tokenizers import Tokenizer

import sevenfold as sf
from sevenfold.engine.device import DeviceRunner
from sevenfold.engine.engine import Engine
from sevenfold.engine.sizing import size_engine
from sevenfold.engine.speculation import PromptLookupConfig
from sevenfold.engine.text_model import TextModel
from sevenfold.models import MoEConfig
from sevenfold.models.checkpoint import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.filterwarnings("ignore:.*has no tuning"),
]
# Widths that every kernel takes, also of half the heads and half the width.
WIDTHS = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDTHS |= {"intermediate_size": 128, "rotary_dim": 32, "max_position_embeddings": 400}
# In bf16 a router near a tie chooses another expert, which no error rule allows: there all are.
ALL_EXPERTS = MoEConfig(num_local_experts=3, num_experts_per_tok=3)
MIXES = {
    "fp32": ("llf", torch.float32, {}),
    "fp32 experts": ("llf", torch.float32, {"moe": MOE}),
    "bf16 experts": ("llf", torch.bfloat16, {"moe": ALL_EXPERTS}),
    "bf16 window": ("lsf", torch.bfloat16, {}),
}
CHAIN = PromptLookupConfig(min_match_tokens=1, adaptive=False)
TEXTS = [*prompts(0, [1, 70, 3, 17, 16]), [5, 6, 7] * 30]
NUM_TOKENS = 24
MEMORY = 64 << 20


def saved(name: str, folder: Path, tokenizer: Tokenizer) -> Path:
    mix, dtype, fields = MIXES[name]
    save_model(tamed(tiny_model(mix, **(WIDTHS | fields))).to(dtype), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@contextmanager
def engine_of(
    folder: Path,
    num_ranks: int,
    sizes: Sequence[int] | None = None,
    speculation: PromptLookupConfig | None = None,
) -> Iterator[Engine]:
    source = TextModel.load(folder, device="cuda", tensor_parallel=num_ranks)
    plan, limits = size_engine(source.model, budget_bytes=MEMORY, speculation=speculation)
    engine = Engine(
        source.model,
        source.tokenizer,
        plan,
        limits.model_copy(update={"max_running": 4}),
        decode_batch_sizes=sizes,
        speculation=speculation,
        ranks=source.ranks,
    )
    try:
        engine.warm_up()
        yield engine
    finally:
        if source.ranks is not None:
            processes = source.ranks._processes
            source.ranks.close()
            assert [process.returncode for process in processes] == [0] * (num_ranks - 1)
            assert not torch.distributed.is_initialized()


def serve(engine: Engine) -> list[list[int]]:
    for n, text in enumerate(TEXTS):
        submit(engine, str(n), text, NUM_TOKENS)
    events = run(engine)
    return [tokens(events[str(n)]) for n in range(len(TEXTS))]


@pytest.mark.parametrize("name", MIXES)
def test_ranks_give_greedy_tokens_recorded_or_not(
    name: str, tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    folder, found = saved(name, tmp_path, tokenizer), {}
    caplog.set_level(logging.WARNING, "sevenfold.engine")
    for kind, sizes in (("recorded", None), ("as it comes", ())):
        with engine_of(folder, 2, sizes) as engine:
            runner = engine._worker.runner
            assert isinstance(runner, DeviceRunner)
            assert engine._worker.ahead is not None
            can_record = name != "fp32 experts"  # the products of experts are bf16's
            assert (runner._graphs is not None) == (kind == "recorded" and can_record)
            if runner._graphs is not None:
                assert runner._graphs._recorder.recorded
            found[kind] = serve(engine)
    with engine_of(folder, 1) as engine:
        found["one rank"] = serve(engine)
        if engine._worker.model.dtype == torch.float32:
            assert found["recorded"] == found["as it comes"] == found["one rank"]
        judge = Judge(engine._worker.model)
    for kind in ("recorded", "as it comes"):
        for text, chosen in zip(TEXTS, found[kind], strict=True):
            judge.check(tuple(text), chosen)
    assert 2 * judge.num_decided > judge.num_tokens, "most tokens must leave no choice"
    # No rank had to be killed, none was gone before.
    assert caplog.records == []


def test_ranks_check_drafts_by_recordings(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = saved("fp32", tmp_path, tokenizer)
    with engine_of(folder, 2, speculation=CHAIN) as engine:
        assert engine._worker._verifier._recorder.recorded
        found = serve(engine)
        counters = engine.speculation_counters()
        assert counters is not None
        assert counters.num_drafts > 0
    with engine_of(folder, 1) as engine:
        assert found == serve(engine)


def test_drawn_tokens_reach_all_ranks_in_steps_ahead(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Sharing them waits for no host: seeded draws of two ranks are those of one, in fp32."""
    folder, found = saved("fp32", tmp_path, tokenizer), []
    for num_ranks in (1, 2):
        with engine_of(folder, num_ranks) as engine:
            for n, text in enumerate(TEXTS):
                submit(engine, str(n), text, NUM_TOKENS, temperature=0.9, seed=n)
            events = run(engine)
            found.append([tokens(events[str(n)]) for n in range(len(TEXTS))])
    assert found[0] == found[1]


def test_an_llm_may_follow_another(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    folder, found = saved("bf16 experts", tmp_path, tokenizer), []
    caplog.set_level(logging.WARNING, "sevenfold.engine")
    params = sf.SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    for _ in range(2):
        llm = sf.LLM(folder, device="cuda", tensor_parallel=2, memory_bytes=MEMORY)
        found.append([one.token_ids for one in llm.generate(TEXTS, params)])
        processes = llm._ranks._processes
        llm.close()
        llm.close()
        assert [process.returncode for process in processes] == [0]
    assert found[0] == found[1]
    assert caplog.records == []
