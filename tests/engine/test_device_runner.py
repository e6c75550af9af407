"""The runner for a GPU on a CPU: the same tokens, and padding and stale buffers change nothing."""

import copy
import re

import numpy as np
import pytest
import torch
from device_helpers import PAGE_TOKENS, FakeCapture, Places, new_runner, new_storage, prompt
from engine_helpers import MOE, tiny_model, uncached
from test_engine import MIXES, build, prompts, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.config import ConfigError
from sevenfold.engine import worker as worker_module
from sevenfold.engine.device import (
    chunk_token_bytes,
    decode_batch_sizes,
    gathered_logits_bytes,
    graph_bytes,
)
from sevenfold.engine.device.decode_inputs import DecodeInputs, Size
from sevenfold.engine.device.graphs import DecodeGraphs
from sevenfold.engine.device.staging import Staging
from sevenfold.engine.rows import NextRow, Row
from sevenfold.engine.runner import Runner
from sevenfold.engine.runners import is_recordable
from sevenfold.engine.storage import Storage
from sevenfold.engine.transfer import Arriving, side_by_side, upload, upload_parts
from sevenfold.models import Batch, HybridModel, empty_state
from sevenfold.models.accounting import state_bytes
from sevenfold.ops import advance_rows
from sevenfold.ops.testing import check_error

CPU = torch.device("cpu")


@pytest.fixture(params=["graphs", "one size", "no graphs"])
def capture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCapture | None:
    """Engines take the runner for a GPU."""
    capture = None if request.param == "no graphs" else FakeCapture()
    sizes = (8,) if request.param == "one size" else (1, 2, 4)
    prefills = (8, 64, 128) if request.param == "graphs" else ()
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, **__: new_runner(model, storage, capture, sizes, prefills),
    )
    return capture


@pytest.mark.parametrize("mix", [*MIXES, "moe"])
def test_the_engine_gives_the_same_tokens(
    mix: str, tokenizer: Tokenizer, capture: FakeCapture | None
) -> None:
    fields = {"moe": MOE} if mix == "moe" else {}
    model = tiny_model("llf" if mix == "moe" else mix, max_position_embeddings=200, **fields)
    texts = prompts(0, [1, 70, 3, 17, 16])
    engine = build(model, tokenizer, max_step_tokens=300, max_running=5)
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 7)
    events = run(engine)
    found = [tokens(events[str(n)]) for n in range(len(texts))]
    assert found == [uncached(model, text, 7) for text in texts]
    # Snapshots that a prefill wrote on its way serve the next turn.
    second = [*texts[1], *found[1], 5]
    again = submit(engine, "again", second, 4)
    assert tokens(run(engine)["again"]) == uncached(model, second, 4)
    assert again.num_cached_tokens >= 64
    assert capture is None or capture.replayed > capture.recorded > 0


def started(model: HybridModel, storage: Storage, runner: object, lengths: list[int]) -> list[Row]:
    """Rows that go on with one token each, after prompts that the runner has seen."""
    rows, places = [], Places(storage)
    for n, length in enumerate(lengths):
        where = (places.state(n + 1), places.pages(n), {})
        runner.run([Row(prompt(length, seed=n), 0, *where)])
        rows.append(Row([7 + n], length, *where))
    return rows


def of_rows(storage: Storage, rows: list[Row]) -> list[torch.Tensor]:
    """The states and pages of the rows."""
    states = [row.state for row in rows if row.state is not None]
    pages = [page for row in rows for page in row.pages]
    return [
        pool[states if name == "states" else pages]
        for layer in storage.layers
        for name, pool in vars(layer).items()
        if name not in ("snapshots", "drafts")
    ]


@pytest.mark.parametrize("mix", MIXES)
def test_padding_and_what_buffers_held_change_no_bit(mix: str) -> None:
    model = tiny_model(mix)
    quiet = new_storage(model)
    runner = new_runner(model, quiet, FakeCapture(), (4,))
    wanted = runner.run(started(model, quiet, runner, [9, 20])).clone()
    noisy = new_storage(model)
    runner, places = new_runner(model, noisy, FakeCapture(), (4,)), Places(noisy)
    rows = started(model, noisy, runner, [9, 20])
    # Another crowd passes through the same buffers, and the sink holds what no number is.
    crowd = [Row([n], 31, places.state(3 + n), places.pages(3), {}) for n in range(4)]
    runner.run(crowd)
    for layer in noisy.layers:
        for name, pool in vars(layer).items():
            if name != "drafts":
                (pool.exact if name == "snapshots" else pool)[0] = float("nan")
    assert torch.equal(runner.run(rows), wanted)
    for a, b in zip(of_rows(quiet, rows), of_rows(noisy, rows), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mix", MIXES)
def test_a_step_writes_to_its_rows_and_to_the_sink(mix: str) -> None:
    model = tiny_model(mix)
    storage = new_storage(model)
    runner, slab_bytes = new_runner(model, storage, FakeCapture(), (4,)), storage.layout.slab_bytes
    rows = started(model, storage, runner, [9, 20])
    slabs = storage._arena.view(-1, slab_bytes)
    before = slabs.clone()
    runner.run(rows)
    changed = (slabs != before).any(-1).nonzero().flatten().tolist()
    # The new tokens are the 10th and the 21st: the first page of one, the second of the other.
    states = [1, 2] if rows[0].state else []
    pages = [8, 11] if rows[0].pages[0] else []
    assert [slab for slab in changed if slab] == states + pages


def test_snapshots_are_the_states_at_their_places() -> None:
    model = tiny_model("lf")
    storage, cut = new_storage(model), new_storage(model)
    places, text = Places(storage), prompt(20, 1)
    kept = {16: places.snapshot(0), 20: places.snapshot(1)}
    rows = [Row(text, 0, places.state(1), places.pages(0), kept)]
    rows.append(Row(prompt(5, 2), 0, places.state(2), places.pages(1), {}))
    found = new_runner(model, storage, None).run(rows)
    plain = Runner(model, cut, page_tokens=PAGE_TOKENS).run(rows)
    assert found.argmax(-1).tolist() == plain.argmax(-1).tolist()
    lightning, other = storage.layers[0], cut.layers[0]
    assert torch.equal(lightning.snapshots.exact[kept[20]], lightning.states[places.state(1)])
    exact = states_after(model, text)
    for tokens_seen, slot in kept.items():
        honest, found_here = other.snapshots.exact[slot], lightning.snapshots.exact[slot]
        check_error(f"after {tokens_seen}", found_here, honest, exact[tokens_seen])
    # While decoding, a snapshot is a copy of the state.
    runner = new_runner(model, storage, FakeCapture(), (2,))
    at = places.snapshot(2)
    runner.run([Row([3], 20, places.state(1), places.pages(0), {21: at})])
    assert torch.equal(lightning.snapshots.exact[at], lightning.states[places.state(1)])


def states_after(model: HybridModel, text: list[int]) -> dict[int, torch.Tensor]:
    """The first layer's state after 16 and after 20 tokens, in fp64."""
    exact, found = copy.deepcopy(model).double(), {}
    for end in (16, 20):
        start = empty_state(model.config, 1, end, device=CPU, dtype=torch.float64)
        batch = Batch.rows(1, end, device=CPU)
        after = exact.hidden(torch.tensor([text[:end]]), batch, start).state
        found[end] = after[0].kv[0]
    return found


def test_a_step_leaves_what_the_next_one_would_be_sent() -> None:
    """A row at the end of its page, one of nobody, and one that comes to the end of its table."""
    rows = [NextRow(14, 3, [5, 6]), None, NextRow(15 * 16 + 14, None, [*range(20, 36)])]
    size, tokens = Size(4, 16), torch.tensor([7, 0, 8])
    inputs = DecodeInputs(size, CPU)
    inputs.fill_ahead(rows, tokens, PAGE_TOKENS)
    logits = torch.eye(4, 9)
    logits[2, 5] = float("inf")
    for step in (1, 2, 3):
        advance_rows(logits, inputs.chosen, inputs.places, inputs.pages, page_tokens=PAGE_TOKENS)
        sent = DecodeInputs(size, CPU)
        later = [row and row._replace(past=row.past + step) for row in rows]
        sent.fill_ahead(later, tokens, PAGE_TOKENS)
        for name in ("slots", "places", "pages", "positions"):
            assert torch.equal(getattr(inputs, name), getattr(sent, name)), name
        assert inputs.chosen.tolist() == [[0, 1], [1, 1], [5, 0], [3, 1]]


def test_rows_are_sent_when_one_of_them_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, send = [], Staging.send
    monkeypatch.setattr(Staging, "send", lambda one: sent.append(one) or send(one))
    inputs, pages = DecodeInputs(Size(2, 16), CPU), [5, 6]
    row = NextRow(3, 1, pages)
    inputs.fill_ahead([row], inputs.chosen[:1, 0], PAGE_TOKENS)
    for change in ({}, {"state": 2}, {"pages": [5, 7]}, {"past": 9}):
        inputs.fill([Row([4], row.past, row.state, row.pages, {})], PAGE_TOKENS)
        sent.clear()
        after = row._replace(past=row.past + 1)._replace(**change)
        inputs.fill_ahead([after], inputs.chosen[:1, 0], PAGE_TOKENS)
        assert len(sent) == bool(change), change
        inputs.fill_ahead([after._replace(past=after.past + 1), after], *AHEAD)
        assert len(sent) == bool(change) + 1, "a row more"
        inputs.fill_ahead([None, after._replace(past=after.past + 1)], *AHEAD)
        assert len(sent) == bool(change) + 2, "a row that has gone"


AHEAD = (torch.tensor([1, 2]), PAGE_TOKENS)


def test_sizes() -> None:
    assert decode_batch_sizes(1) == (1,)
    assert decode_batch_sizes(6) == (1, 2, 4, 6)
    assert decode_batch_sizes(100) == (1, 2, 4, *range(8, 64, 8), 64, 96, 100)
    graphs = DecodeGraphs(lambda x: x.ids, FakeCapture(), (2, 4), device=CPU)
    row = Row([1], 0, None, [1, 2, 3], {})
    assert (graphs.size_of([row]).rows, graphs.size_of([row]).pages) == (2, 16)
    long = Row([1], 0, None, list(range(129)), {})
    assert (graphs.size_of([row, row, long]).rows, graphs.size_of([long]).pages) == (4, 1024)
    assert graphs.size_of([row] * 4).rows == 4
    assert graphs.size_of([row] * 5) is None
    assert graphs.size_of([Row([1], 0, 1, [], {})]).pages == 16


@pytest.mark.parametrize("sizes", [(), (0, 1), (2, 2), (4, 2)])
def test_wrong_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"rise from 1 or more, got {list(sizes)}")):
        DecodeGraphs(lambda x: x.ids, FakeCapture(), sizes, device=CPU)


def test_a_cpu_records_no_graphs(tokenizer: Tokenizer) -> None:
    model = tiny_model("lf")
    engine = build(model, tokenizer)
    assert isinstance(engine._worker.runner, Runner)
    with pytest.raises(ConfigError, match="decode_batch_sizes must be None on cpu, which records"):
        worker_module.make_runner(model, new_storage(model), (16, 4), (1, 2))


def test_a_graph_holds_steps_that_do_not_wait() -> None:
    assert is_recordable(tiny_model("lf"))
    # Experts on a CPU count their rows on the host; no kernel takes such a head.
    assert not is_recordable(tiny_model("lf", torch.bfloat16, moe=MOE))
    assert not is_recordable(tiny_model("lf", head_dim=257))


def test_more_rows_than_any_size_run_as_they_come() -> None:
    model = tiny_model("lf")
    capture = FakeCapture()
    storage, other = new_storage(model), new_storage(model)
    runner = new_runner(model, storage, capture, (1,))
    rows = started(model, storage, runner, [9, 20])
    plain = new_runner(model, other, None)
    assert torch.equal(runner.run(rows), plain.run(started(model, other, plain, [9, 20])))
    assert capture.recorded == 0


def test_numbers_go_and_come() -> None:
    assert upload([3, 1, 2], CPU).tolist() == [3, 1, 2]
    assert upload([], CPU).dtype == torch.int64
    columns = [torch.tensor([5, 6]), torch.tensor([True, False])]
    assert Arriving(side_by_side(columns)).numbers() == [[5, 6], [1, 0]]


def test_parts_are_sent_together_each_on_a_border_of_16_bytes() -> None:
    """Else kernels would be compiled anew for prompts whose numbers lie otherwise."""
    sent = upload_parts([np.arange(n) + n for n in (3, 0, 251, 2, 1)], CPU)
    assert [x.tolist() for x in sent] == [[*range(n, 2 * n)] for n in (3, 0, 251, 2, 1)]
    assert [(x.data_ptr() - sent[0].data_ptr()) % 16 for x in sent if len(x)] == [0] * 4


def test_bytes_of_graphs_grow_with_rows_by_the_formula() -> None:
    config = tiny_model("lf").config
    one, two = (graph_bytes(config, rows, 0, element_bytes=2) for rows in (1, 2))
    # 2 bytes x (6 x 16 + 3 x 12 + 5 x 16) activations, 32 shares of 2 x 9 in fp32, fp32 logits.
    assert two - one == 2 * 212 + 4 * 32 * 18 + 4 * 300
    linear = tiny_model("ll").config
    less = graph_bytes(linear, 2, 0, element_bytes=2) - graph_bytes(linear, 1, 0, element_bytes=2)
    assert two - one - less == 4 * 32 * 18


def test_bytes_of_graphs_grow_with_a_prefill_s_tokens_by_the_formula() -> None:
    config = tiny_model("lf").config
    none, one = (graph_bytes(config, 4, tokens, element_bytes=2) for tokens in (0, 1))
    # A chunk's activations, 16 bytes a head between segments, 5 x 4 numbers of 8 bytes.
    token, state = chunk_token_bytes(config, element_bytes=2) + 16 * 2 + 160, state_bytes(config)
    assert one - none == token + state, "a prefill reads its state at a copy"
    # Shares of 32 for each of 512 tokens at most, where steps had them for 4 rows.
    for length in (100, 512, 1000):
        shares = (min(length, 512) - 4) * 4 * 32 * 18
        found = graph_bytes(config, 4, length, element_bytes=2) - none
        assert found == length * token + state + shares


def test_ranks_gather_their_logits_before_they_join_them() -> None:
    config = tiny_model("lf").config
    assert gathered_logits_bytes(config, 5, 1) == 0
    # Of 5 rows 300 numbers that are gathered, twice, and 150 of this rank.
    assert gathered_logits_bytes(config, 5, 2) == 4 * 5 * 750
