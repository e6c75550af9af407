"""Speculation over states in fewer bits: near fp32, repeatable, the same in any company."""

import pytest
import torch
from device_helpers import PAGE_TOKENS, prompt
from engine_helpers import tiny_model
from speculation_helpers import CHAIN, TREE, build, is_idle, repeating, run, submit, tokens
from tokenizers import Tokenizer
from verifier_bench import real_rows

from sevenfold.engine.engine import Engine
from sevenfold.engine.memory import MemoryPlan, plan_memory
from sevenfold.engine.memory_report import plan_report
from sevenfold.engine.request import Request
from sevenfold.engine.rows import Row
from sevenfold.engine.runner import Runner
from sevenfold.engine.speculation import RING_TOKENS
from sevenfold.engine.speculation.pending import PendingDrafts
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.engine.speculation.verifier import DraftRow, Verifier
from sevenfold.engine.state_layout import RING_TOKENS as OWN_RING_TOKENS
from sevenfold.engine.storage import Storage
from sevenfold.models import HybridModel

UNITS = {"fp16": 2.0**-10, "int8": 1 / 127}
# The right continuation is 4, 5, 6, 7; in the tree beside wrong ones.
CHAIN_OF_4 = (DraftTree((5, 6, 7), (0, 1, 2)), [0, 1, 2, 3])
TREE_OF_4 = (DraftTree((9, 5, 8, 6, 7), (0, 0, 2, 2, 4)), [0, 2, 4, 5])
SHAPES = pytest.mark.parametrize("shape", [CHAIN_OF_4, TREE_OF_4], ids=["chain", "tree"])
KNOWN = prompt(20, seed=1)


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return tiny_model("lllf", max_position_embeddings=200)


def plan_of(model: HybridModel, dtype: str) -> MemoryPlan:
    size = {"budget_bytes": 1 << 20, "context_tokens": 64, "page_tokens": PAGE_TOKENS}
    how = {"kv_element_bytes": 4, "ring_tokens": RING_TOKENS, "state_dtype": dtype}
    return plan_memory(model.config, **size, **how)


class Bench:
    """One request whose prompt was run."""

    def __init__(self, model: HybridModel, dtype: str) -> None:
        plan = plan_of(model, dtype)
        self.storage = Storage(model.config, plan, device=model.device, dtype=model.dtype)
        self.pending = PendingDrafts(model, self.storage)
        self.runner = Runner(model, self.storage, page_tokens=PAGE_TOKENS)
        self.verifier = Verifier(model, self.storage, self.pending, page_tokens=PAGE_TOKENS)
        states, pages, snapshots = plan.layout.places
        # Slabs of their own: the state in 1, pages from 2 on, a snapshot in the last.
        self.state, self.pages = states, list(range(2 * pages, 2 * pages + 5))
        self.snapshot = snapshots * (plan.layout.num_slabs - 1)
        self.past = 0
        self.decode(KNOWN)

    def row(self, ids: list[int], snapshots: dict[int, int] | None = None) -> Row:
        return Row(ids, self.past, self.state, self.pages, snapshots or {}, seed=3)

    def decode(self, ids: list[int]) -> torch.Tensor:
        """Run tokens without guesses; the logits after the last."""
        self.pending.commit([self.state])
        logits = self.runner.run([self.row(ids)])[0]
        self.past += len(ids)
        return logits

    def verify(self, shape: tuple, root: int, snapshots: dict[int, int]) -> torch.Tensor:
        """Check a draft and take its right nodes: the logits after these."""
        tree, path = shape
        draft = DraftRow.of(self.row([root], snapshots), tree)
        logits = real_rows(self.verifier.run([draft]), [draft])[path]
        self.verifier.accept([(draft, path)])
        self.past += len(path)
        return logits


def several(model: HybridModel, dtype: str, shape: tuple | None) -> torch.Tensor:
    """The logits after tokens that come by drafts, or one by one, with plain steps between."""
    bench, found = Bench(model, dtype), []
    for turn in range(6):
        if shape is None:
            found += [bench.decode([token]) for token in (4, 5, 6, 7)]
        else:
            found += list(bench.verify(shape, 4, {}))
        if turn % 3 == 2:
            found.append(bench.decode([11]))
    return torch.stack(found)


@SHAPES
@pytest.mark.parametrize("dtype", UNITS)
def test_logits_lie_near_those_of_fp32(model: HybridModel, dtype: str, shape: tuple) -> None:
    exact, got = several(model, "fp32", None), several(model, dtype, shape)
    error = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() > 0
    assert error.median() < 10 * UNITS[dtype]
    assert torch.equal(got, several(model, dtype, shape)), "a run is repeatable"


@SHAPES
def test_int8_states_are_rounded_no_sooner_than_without_guesses(
    model: HybridModel, shape: tuple
) -> None:
    """Until the ring is full a draft adds no rounding: only sums are ordered otherwise."""
    drafted, plain = Bench(model, "int8"), Bench(model, "int8")
    found, wanted = [], []
    for _ in range(OWN_RING_TOKENS // 4):
        found += list(drafted.verify(shape, 4, {}))
        wanted += [plain.decode([token]) for token in (4, 5, 6, 7)]
    codes = [
        torch.equal(a.states.pool.codes, b.states.pool.codes)
        for a, b in zip(drafted.storage.layers[:3], plain.storage.layers[:3], strict=True)
    ]
    assert codes == [True] * 3
    honest = several(model, "fp32", shape)[:12]
    spread = (honest.double() - several(model, "fp32", None)[:12].double()).abs().max()
    difference = (torch.stack(found)[:12].double() - torch.stack(wanted)[:12].double()).abs().max()
    assert difference <= 4 * spread


@SHAPES
@pytest.mark.parametrize("dtype", UNITS)
def test_a_snapshot_inside_a_draft(model: HybridModel, dtype: str, shape: tuple) -> None:
    """The state after two tokens of the draft, and what follows goes on from all four."""
    bench, plain = Bench(model, dtype), Bench(model, dtype)
    at = bench.snapshot
    bench.verify(shape, 4, {bench.past + 2: at})
    after = bench.decode([11])
    for token in (4, 5):
        plain.decode([token])
    kept = plain.snapshot
    plain.storage.snapshot([plain.state], [kept])
    for token in (6, 7):
        plain.decode([token])
    wanted = plain.decode([11])
    for mine, other in zip(bench.storage.layers[:3], plain.storage.layers[:3], strict=True):
        a, b = mine.snapshots.exact[at], other.snapshots.exact[kept]
        assert (a - b).norm() <= 4 * UNITS[dtype] * b.norm()
    assert (after - wanted).norm() <= 10 * UNITS[dtype] * wanted.norm()


def engine_of(model: HybridModel, tokenizer: Tokenizer, mode, dtype: str) -> Engine:
    return build(model, tokenizer, mode, state_dtype=dtype)


@pytest.mark.parametrize("mode", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("dtype", UNITS)
def test_a_crowd_gets_what_each_gets_alone(
    model: HybridModel, tokenizer: Tokenizer, dtype: str, mode
) -> None:
    texts, alone = repeating(0, [1, 60, 17, 40]), []
    for text in texts:
        engine = engine_of(model, tokenizer, mode, dtype)
        submit(engine, "one", text, 30)
        alone.append(tokens(run(engine)["one"]))
    engine = engine_of(model, tokenizer, mode, dtype)
    idle = engine.cache.usage()
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 30)
    events = run(engine)
    assert [tokens(events[str(n)]) for n in range(len(texts))] == alone
    assert engine.speculation_counters().num_accepted_tokens > 0
    second: Request = submit(engine, "second", [*texts[1], *alone[1], 5], 8)
    assert len(tokens(run(engine)["second"])) == 8
    assert second.num_cached_tokens >= 64
    assert is_idle(engine, idle)


def test_an_int8_state_takes_drafts_into_its_own_ring(model: HybridModel) -> None:
    plan = plan_of(model, "int8")
    assert plan.ring_bytes == 0
    assert f"int8 and a ring of {OWN_RING_TOKENS + RING_TOKENS} tokens" in plan_report(plan)
    assert plan_of(model, "fp16").ring_bytes == plan_of(model, "fp32").ring_bytes > 0
    storage = Storage(model.config, plan, device=model.device, dtype=model.dtype)
    assert storage.layers[0].states.pool.ring_k.shape[2] == OWN_RING_TOKENS + RING_TOKENS
