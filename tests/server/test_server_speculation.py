"""Speculation behind the server: the same answers, and what it did in the metrics."""

import re

import pytest
from server_helpers import client_of, make_engine

from sevenfold.engine import LLM, TextModel
from sevenfold.engine.sizing import size_engine
from sevenfold.engine.speculation import (
    DraftModel,
    DraftModelConfig,
    PromptLookupConfig,
    SpeculationConfig,
)
from sevenfold.server import BatchingEngine

pytestmark = pytest.mark.anyio


COPIED = PromptLookupConfig(min_match_tokens=1, adaptive=False)
DECODED = DraftModelConfig(memory_bytes=1 << 19, context_tokens=128, adaptive=False)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("config", [COPIED, DECODED])
async def test_answers_and_counts(llm: LLM, config: SpeculationConfig, branches: int) -> None:
    speculation = config.model_copy(update={"branches": branches})
    draft = DraftModel(llm.model, llm.tokenizer) if config is DECODED else None
    plan, limits = size_engine(llm.model, budget_bytes=1 << 20, speculation=speculation)
    source = TextModel(llm.model, llm.tokenizer)
    engine = BatchingEngine(source, "tiny", plan, limits, speculation=speculation, draft=draft)
    ask = {"prompt": "herons and herons and", "max_tokens": 40, "temperature": 0}
    texts, counts = [], []
    for served in (make_engine(llm), engine):
        async with client_of(served) as client:
            answer = (await client.post("/v1/completions", json=ask)).json()
            texts.append(answer["choices"][0]["text"])
            lines = (await client.get("/metrics")).text
        found = re.findall(r"^sevenfold_(?:drafted|accepted)_tokens_total (\S+)", lines, re.M)
        counts.append([float(n) for n in found])
    assert texts[0] == texts[1]
    assert counts[0] == [0, 0]
    assert counts[1][0] >= counts[1][1]
    assert counts[1][0] > 0
    if config is DECODED:  # by the model itself
        assert counts[1][1] > 20
