"""Before the first request all is recorded that it needs, and only the sink is written."""

import re

import pytest
from device_helpers import FakeCapture, new_runner
from engine_helpers import MOE, tiny_model, uncached
from test_engine import MIXES, build, prompts, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.engine import worker as worker_module
from sevenfold.engine.device.decode_inputs import Size
from sevenfold.engine.engine import Engine
from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.tensor_parallel.messages import Orders, read_orders
from sevenfold.engine.warm_up import Reach, WarmUpStoppedError, first_drafts, first_runs

BATCH_SIZES, PREFILL_SIZES = (1, 2, 4), (8, 64, 128)
REACH = Reach(most_tokens=100_000, chunk_tokens=32_768, page_tokens=64, has_states=True)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    """Engines take the runner for a GPU."""
    capture = FakeCapture()
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, invariant: new_runner(
            model,
            storage,
            capture,
            (5,) if invariant else BATCH_SIZES,
            () if invariant else PREFILL_SIZES,
        ),
    )
    return capture


def warmed(engine: Engine) -> list[str]:
    lines: list[str] = []
    engine.warm_up(lines.append)
    return lines


@pytest.mark.parametrize("mix", [*MIXES, "moe"])
def test_requests_record_nothing_and_get_what_they_always_get(
    mix: str, tokenizer: Tokenizer, capture: FakeCapture
) -> None:
    fields = {"moe": MOE} if mix == "moe" else {}
    model = tiny_model("llf" if mix == "moe" else mix, max_position_embeddings=200, **fields)
    engine = build(model, tokenizer, max_step_tokens=300, max_running=4)
    lines = warmed(engine)
    assert capture.recorded == len(BATCH_SIZES) + len(PREFILL_SIZES)
    assert re.fullmatch(r"0 kernels compiled after \d+\.\d s", lines[0])
    assert re.fullmatch(r"\d+ sizes of runs ready after \d+\.\d s", lines[1])
    texts = prompts(0, [2, 70, 3, 17, 16])
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 7)
        found = tokens(run(engine)[str(n)])
        assert found == uncached(model, text, 7)
    for n, text in enumerate(texts):
        submit(engine, f"again {n}", text, 7)
    events = run(engine)
    for n, text in enumerate(texts):
        assert tokens(events[f"again {n}"]) == uncached(model, text, 7)
    assert capture.recorded == len(BATCH_SIZES) + len(PREFILL_SIZES)
    assert capture.replayed > capture.recorded


@pytest.mark.parametrize("mix", MIXES)
def test_only_the_sink_is_written_and_nothing_is_cached(
    mix: str, tokenizer: Tokenizer, capture: FakeCapture
) -> None:
    model = tiny_model(mix, max_position_embeddings=200)
    engine = build(model, tokenizer, max_step_tokens=300, max_running=4)
    storage, usage = engine._worker.storage, engine.cache.usage()
    slabs = storage._arena.view(-1, storage.layout.slab_bytes)
    slabs[SINK + 1 :] = 7
    warmed(engine)
    assert bool((slabs[SINK + 1 :] == 7).all())
    assert bool((slabs[SINK] != 0).any())
    assert engine.cache.usage() == usage
    assert engine.counters().query_tokens == 0
    assert not engine.has_work


def test_in_batch_invariant_mode_the_one_size_is_recorded(
    tokenizer: Tokenizer, capture: FakeCapture
) -> None:
    model = tiny_model("lsf", max_position_embeddings=200)
    engine = build(model, tokenizer, max_step_tokens=300, max_running=5, batch_invariant=True)
    warmed(engine)
    assert list(engine._worker.runner._graphs._recorder.recorded) == [Size(5, 16)]
    text = prompts(0, [40])[0]
    submit(engine, "a", text, 7)
    assert tokens(run(engine)["a"]) == uncached(model, text, 7)
    assert capture.recorded == 1


def test_a_cpu_has_nothing_to_do(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(tiny_model("lf"), tokenizer)
    monkeypatch.setattr(engine._worker, "_run", None)
    assert warmed(engine) == []


def test_a_stop_ends_it_before_its_next_run(
    tokenizer: Tokenizer, capture: FakeCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(tiny_model("lf", max_position_embeddings=200), tokenizer, max_running=4)
    run, runs = engine._worker._run, []

    def stopping(rows: list) -> object:
        runs.append(rows)
        engine.stop_warm_up()
        return run(rows)

    monkeypatch.setattr(engine._worker, "_run", stopping)
    with pytest.raises(WarmUpStoppedError, match="told to stop before it was warm"):
        warmed(engine)
    assert len(runs) == 1
    # And once more: not even a rehearsal.
    monkeypatch.setattr(engine._worker.runner, "rehearsal", None)
    with pytest.raises(WarmUpStoppedError):
        warmed(engine)
    assert len(runs) == 1


def test_the_largest_of_each_kind_comes_first() -> None:
    runs = first_runs(REACH, (1, 2, 16), (64, 512, 8192))
    shapes = [(len(rows), [len(row.tokens) for row in rows][:2], rows[0].past) for rows in runs]
    assert shapes[:3] == [(1, [8192], 0), (1, [512], 0), (1, [64], 0)]
    assert [len(rows) for rows in runs[3:8]] == [16, 2, 2, 1, 1]
    # A page holds 64 tokens; longer tables are for few rows.
    assert [len(rows[0].pages) for rows in runs[3:8]] == [16, 128, 16, 128, 16]
    assert shapes[-5:] == [
        (1, [32_768], 0),
        (1, [32_768], 0),
        (1, [31_744], 0),
        (1, [8705], 0),
        (1, [32_768], 32_768),
    ]
    assert {slot for rows in runs for row in rows for slot in row.snapshots.values()} == {SINK}
    assert {page for rows in runs for row in rows for page in row.pages} == {SINK}
    assert {row.state for rows in runs for row in rows} == {SINK}


@pytest.mark.parametrize("most_tokens", [400, 100_000])
def test_prompts_in_company_are_of_every_kind(most_tokens: int) -> None:
    """Alike or not, with a snapshot that is due or none: kernels differ in that."""
    reach = REACH._replace(most_tokens=most_tokens)
    kinds = {
        (any(row.snapshots for row in rows), len({len(row.tokens) for row in rows}) == 1)
        for rows in first_runs(reach, (1, 2), (64,))
        if len(rows) > 1 and len(rows[0].tokens) > 1
    }
    assert kinds == {(kept, alike) for kept in (True, False) for alike in (True, False)}


def test_nothing_runs_that_no_request_reaches() -> None:
    short = REACH._replace(most_tokens=500, chunk_tokens=256)
    runs = first_runs(short, (1, 2), (64, 512, 8192))
    assert max(sum(len(row.tokens) for row in rows) for rows in runs) <= 256
    assert max(row.end for rows in runs for row in rows) <= 500
    linear = first_runs(REACH._replace(has_states=False), (), ())
    assert {row.state for rows in linear for row in rows} == {None}
    assert not any(row.snapshots for rows in linear for row in rows)
    # Without recorded steps a few sizes run as they come.
    assert [len(rows) for rows in linear[:8]] == [8, 8, 4, 4, 2, 2, 1, 1]


def test_drafts_are_chains_of_every_size() -> None:
    drafts = first_drafts(REACH, (2, 4, 6))
    assert [(len(rows), len(rows[0].row.tokens)) for rows in drafts[:4]] == [
        (4, 6),
        (4, 4),
        (4, 2),
        (2, 6),
    ]
    assert all(draft.tree.is_chain for rows in drafts for draft in rows)
    pages = [(len(rows[0].row.tokens), len(rows[0].row.pages)) for rows in drafts if len(rows) == 1]
    assert pages == [(6, 128), (6, 16), (4, 128), (4, 16), (2, 128), (2, 16)]
    short = first_drafts(REACH._replace(most_tokens=1000), (2, 4, 6))
    assert len(short) == 9


def test_other_ranks_are_told() -> None:
    orders, told = Orders(), []
    orders.warm_up(4000, 512)
    [order] = read_orders(orders.take())

    class Follower:
        def warm_up(self, *numbers: object) -> None:
            told.append(numbers[:2])

    order(Follower())
    assert told == [(4000, 512)]
