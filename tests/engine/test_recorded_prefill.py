"""Recorded prefills on a CPU: of every length what a run as it comes gives, padding nowhere."""

import copy
from collections.abc import Sequence

import pytest
import torch
from device_helpers import PAGE_TOKENS, FakeCapture, Places, new_runner, new_storage, prompt
from engine_helpers import MOE, tiny_model, uncached
from test_engine import MIXES, build, prompts, run, submit, tokens
from tokenizers import Tokenizer
from torch import Tensor

from sevenfold.engine import worker as worker_module
from sevenfold.engine.device import DeviceRunner, prefill_sizes
from sevenfold.engine.device.prefill_graphs import MOST_STOPS, most_keys
from sevenfold.engine.item_words import NOTHING
from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.rows import Row, Scored
from sevenfold.engine.runners import scans_wait_for_nothing
from sevenfold.engine.storage import KVStorage, LinearStorage, Storage
from sevenfold.models import Batch, HybridModel, KVState, LinearState, empty_state, preset
from sevenfold.ops.testing import check_error

SIZES = (8, 16, 24, 32)
# Ends of chunks: each one chunk or two; of sizes, of pages, one beside either, and two tokens.
COURSES = [(2,), (7,), (8,), (9,), (15,), (16,), (17,), (31,), (32,), (16, 32), (9, 24), (15, 31)]


def rows_of(ends: Sequence[int], storage: Storage, stops: Sequence[int] = ()) -> list[Row]:
    """Request 0's chunks, with a snapshot after each of `stops` tokens."""
    places, text = Places(storage), prompt(32, 1)
    kept = {at: places.snapshot(n) for n, at in enumerate(stops)}
    return [
        Row(
            text[first:last],
            first,
            places.state(1),
            places.pages(0),
            {at: slot for at, slot in kept.items() if first < at <= last},
        )
        for first, last in zip((0, *ends), ends, strict=False)
    ]


def recorded(model: HybridModel, storage: Storage) -> DeviceRunner:
    return new_runner(model, storage, FakeCapture(), (1,), SIZES)


def found_in(storage: Storage, row: Row) -> list[Tensor]:
    """The row's state of each linear layer, and its keys of each softmax layer."""
    pages = list(row.pages)
    return [
        layer.k[pages].flatten(0, 1)[: row.end]
        if isinstance(layer, KVStorage)
        else layer.states[row.state]
        for layer in storage.layers
    ]


def exact_after(model: HybridModel, text: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits, states and keys in fp64; a window's keys are its last ones."""
    twin, device = copy.deepcopy(model).double(), torch.device("cpu")
    start = empty_state(model.config, 1, len(text), device=device, dtype=torch.float64)
    after = twin.hidden(torch.tensor([text]), Batch.rows(1, len(text), device=device), start)
    parts = []
    for state in after.state or ():
        assert isinstance(state, LinearState | KVState)
        if isinstance(state, LinearState):
            parts.append(state.kv[0])
            continue
        last = torch.arange(max(0, len(text) - state.num_places), len(text))
        parts.append(state.k[0, last % state.num_places])
    return twin.logits(after.hidden[:, -1]), parts


@pytest.mark.parametrize("mix", [*MIXES, "moe"])
def test_every_length_gives_what_a_run_as_it_comes_gives(mix: str) -> None:
    fields = {"moe": MOE} if mix == "moe" else {}
    model = tiny_model("llf" if mix == "moe" else mix, **fields)
    storage = new_storage(model)
    runner = recorded(model, storage)  # one for all: each course meets what the others left
    runs: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for ends in COURSES:
        plain = new_storage(model)
        for layer in storage.layers:
            if isinstance(layer, LinearStorage):
                layer.states[Places(storage).state(1)] = 0
        rows = rows_of(ends, storage)
        for row in rows:
            found = runner.run([row]).clone()
            honest = new_runner(model, plain, None).run([row])
        exact, parts = exact_after(model, prompt(32, 1)[: ends[-1]])
        runs.setdefault("logits", []).append((found, honest, exact))
        pairs = zip(found_in(storage, rows[-1]), found_in(plain, rows[-1]), parts, strict=True)
        for n, (got, other, wanted) in enumerate(pairs):
            if wanted.shape != got.shape:
                got, other = got[-len(wanted) :], other[-len(wanted) :]
            runs.setdefault(f"layer {n}", []).append((got.clone(), other, wanted))
    # All lengths at once: the largest error of one is a matter of luck.
    for name, three in runs.items():
        check_error(
            name, *(torch.cat([x.flatten() for x in part]) for part in zip(*three, strict=True))
        )
    capture = runner.capture
    assert (capture.recorded, capture.replayed) == (len(SIZES), sum(map(len, COURSES)))


@pytest.mark.parametrize("mix", ["ll", "lsf"])
def test_states_are_kept_where_they_are_due(mix: str) -> None:
    model = tiny_model(mix)
    storage, plain = new_storage(model), new_storage(model)
    runner, unrecorded = recorded(model, storage), new_runner(model, plain, None)
    for ends, stops in [((17, 32), (1, 16, 17, 32)), ((9,), (4, 5)), ((24,), ())]:
        for row in rows_of(ends, storage, stops):
            if row.past == 0:
                for one in (storage, plain):
                    for layer in one.layers:
                        if isinstance(layer, LinearStorage):
                            layer.states[row.state] = 0
            runner.run([row])
            unrecorded.run([row])
        for n, at in enumerate(stops):
            slot, (_, parts) = Places(storage).snapshot(n), exact_after(model, prompt(32, 1)[:at])
            for layer, other, wanted in zip(storage.layers, plain.layers, parts, strict=True):
                if isinstance(layer, LinearStorage):
                    found, honest = layer.snapshots.exact[slot], other.snapshots.exact[slot]
                    check_error(f"after {at} of {ends}", found, honest, wanted)


@pytest.mark.parametrize("mix", MIXES)
def test_padding_and_what_buffers_held_change_no_bit(mix: str) -> None:
    model = tiny_model(mix)
    quiet, noisy = new_storage(model), new_storage(model)
    row = rows_of((9,), quiet)[0]
    wanted = recorded(model, quiet).run([row]).clone()
    runner, places = recorded(model, noisy), Places(noisy)
    for length in (16, 15):  # another prompt in the same buffers, with a snapshot
        kept = {length: places.snapshot(3)} if row.state else {}
        runner.run([Row(prompt(length, 4), 0, places.state(3), places.pages(3), kept)])
    for layer in noisy.layers:
        for name, pool in vars(layer).items():
            if name != "drafts":
                (pool.exact if name == "snapshots" else pool)[SINK] = float("nan")
    assert torch.equal(runner.run([row]), wanted)
    for a, b in zip(found_in(quiet, row), found_in(noisy, row), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mix", MIXES)
def test_a_prefill_writes_to_its_request_and_to_the_sink(mix: str) -> None:
    model = tiny_model(mix)
    storage = new_storage(model)
    slabs = storage._arena.view(-1, storage.layout.slab_bytes)
    before = slabs.clone()
    row = rows_of((9,), storage, (5,) if model.config.count("linear_attention") else ())[0]
    recorded(model, storage).run([row])
    changed = (slabs != before).any(-1).nonzero().flatten().tolist()
    states = [1] if row.state else []
    pages = [8] if row.pages[0] else []
    assert [slab for slab in changed if slab] == [*states, *pages, *([19] if row.snapshots else [])]


def test_what_a_size_holds_and_what_runs_as_it_comes() -> None:
    model = tiny_model("lf", max_position_embeddings=40_000)
    storage = new_storage(model)
    graphs = recorded(model, storage)._prefills
    row = Row([1] * 9, 0, 1, [1], {})

    def size_of(**changed: object) -> int | None:
        return graphs.size_of([row._replace(**changed)])

    assert [size_of(tokens=[1] * n) for n in (2, 8, 9, 24, 25, 32)] == [8, 8, 16, 24, 32, 32]
    assert size_of(tokens=[1] * 33) is None
    keys = most_keys(16)
    assert (size_of(past=keys - 9), size_of(past=keys - 8)) == (16, None)
    assert [most_keys(size) for size in (16, 64, 128, 256, 8192)] == [
        1 << 20,
        1 << 20,
        1 << 20,
        1 << 19,
        1 << 14,
    ]
    assert size_of(snapshots=dict.fromkeys(range(MOST_STOPS), 1)) == 16
    assert size_of(snapshots=dict.fromkeys(range(MOST_STOPS + 1), 1)) is None
    assert size_of(scored=Scored([], 0, [])) is None
    assert graphs.size_of([row, row]) is None


def test_the_largest_size_is_recorded_first_and_each_one_once() -> None:
    model, seen = tiny_model("lf"), []
    storage = new_storage(model)
    runner = recorded(model, storage)
    graphs = runner._prefills
    allocate = graphs._recorder.new_inputs
    object.__setattr__(
        graphs._recorder, "new_inputs", lambda size: (seen.append(size), allocate(size))[1]
    )
    for row in rows_of((9, 17, 31), storage):
        runner.run([row])
    assert seen == [32, 16, 8]
    assert list(graphs._recorder.recorded) == seen


def test_prompts_one_by_one_give_the_same_tokens(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = FakeCapture()
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, **__: new_runner(model, storage, capture, (1, 2), (8, 64, 128)),
    )
    model = tiny_model("lsf", max_position_embeddings=200)
    engine = build(model, tokenizer, max_step_tokens=150, max_running=2)
    for n, text in enumerate(prompts(0, [2, 70, 8, 9, 64, 130])):
        submit(engine, str(n), text, 5)
        found = tokens(run(engine)[str(n)])
        assert found == uncached(model, text, 5)
        # Snapshots that a recorded prefill kept serve the next turn.
        second = [*text, *found, 5]
        submit(engine, f"{n} again", second, 3)
        assert tokens(run(engine)[f"{n} again"]) == uncached(model, second, 3)
    assert set(engine._worker.runner._prefills._recorder.recorded) == {128, 64, 8}


def test_sizes_go_as_far_as_launches_take_longer_than_work() -> None:
    sizes = (16, 32, 64, 80, 96, 112, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
    assert prefill_sizes(preset("bench-2b")) == sizes
    assert prefill_sizes(preset("minimax-text-01")) == (16, 32, 64, 80, 96, 112, 128, 256, 512, 768)
    assert prefill_sizes(tiny_model("lf", max_position_embeddings=400).config) == (
        16,
        32,
        64,
        80,
        96,
        112,
        128,
        256,
        512,
    )
    assert prefill_sizes(tiny_model("lf", max_position_embeddings=512).config) == (
        16,
        32,
        64,
        80,
        96,
        112,
        128,
        256,
        512,
    )


def test_a_scan_that_counts_on_the_host_is_not_recorded() -> None:
    assert not scans_wait_for_nothing(tiny_model("lf"))
    assert scans_wait_for_nothing(tiny_model("ff"))


def test_pages_of_a_prompt_have_room() -> None:
    storage = new_storage(tiny_model("lf"))
    inputs = recorded(tiny_model("lf"), storage)._new_prefill_inputs(8)
    keys = most_keys(8)
    assert inputs.pages.shape == (1, keys // PAGE_TOKENS)
    pages = list(range(1, keys // PAGE_TOKENS + 3))
    inputs.fill(Row([5, 6, 7], keys - 3, 4, pages, {}), NOTHING)
    inputs.send()
    assert inputs.pages[0].tolist() == pages[:-2]
    assert inputs.page.tolist() == [pages[-3]] * 3 + [SINK] * 5
    assert inputs.place.tolist() == [13, 14, 15, 0, 0, 0, 0, 0]
    assert inputs.ids[0].tolist() == [5, 6, 7, 5, 6, 7, 5, 6]
    assert inputs.positions[0, :3].tolist() == [keys - 3, keys - 2, keys - 1]
    assert [x.tolist() for x in (inputs.slots, inputs.key_lengths)] == [[4], [keys]]
    assert (inputs.borders.tolist(), inputs.last.tolist()) == ([0, 3], [2])
