"""Speculation behind the server: the same answers, and what it did in the metrics."""

import re

import pytest
from server_helpers import client_of, make_engine

from sevenfold.engine import LLM, TextModel
from sevenfold.engine.sizing import size_engine
from sevenfold.engine.speculation import PromptLookupConfig
from sevenfold.server import BatchingEngine

pytestmark = pytest.mark.anyio


async def test_answers_and_counts(llm: LLM) -> None:
    speculation = PromptLookupConfig(min_match_tokens=1, adaptive=False)
    plan, limits = size_engine(llm.model, budget_bytes=1 << 20, speculation=speculation)
    source = TextModel(llm.model, llm.tokenizer)
    engine = BatchingEngine(source, "tiny", plan, limits, speculation=speculation)
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
