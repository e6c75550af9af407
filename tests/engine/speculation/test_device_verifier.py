"""Verification for a GPU on a CPU: the same tokens; padding and stale buffers change nothing."""

import copy
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch
from device_helpers import FakeCapture, new_runner, prompt
from engine_helpers import shared_model, tiny_model, uncached
from speculation_helpers import CHAIN, TREE, build, is_idle, repeating, run, submit, tokens
from tokenizers import Tokenizer
from verifier_bench import CHAINS, TREES, Bench, real_rows

from sevenfold.engine import transfer
from sevenfold.engine import worker as worker_module
from sevenfold.engine.device import DeviceVerifier, graphs
from sevenfold.engine.device.staging import Staging
from sevenfold.engine.rows import Row
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.engine.speculation.verifier import DraftRow
from sevenfold.engine.storage import KVStorage
from sevenfold.models import HybridModel
from sevenfold.ops.testing import check_error

LAYERS = ["ll", "ff", "lsf", "llsl"]


SIZES = {"graphs": (1, 2, 4), "one size": (8,), "no graphs": ()}
MODES = {"chain": CHAIN, "tree": TREE}
# Every two of a mix, of sizes and of a mode.
CASES = [
    (layers, sizes, list(MODES)[(m + n) % 2])
    for m, layers in enumerate(LAYERS)
    for n, sizes in enumerate(SIZES)
]


@pytest.mark.parametrize(("layers", "size", "mode"), CASES)
def test_the_engine_gives_the_same_tokens(
    layers: str, size: str, mode: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = shared_model(layers), SIZES[size]
    capture = FakeCapture() if sizes else None
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, **__: new_runner(model, storage, capture, sizes),
    )
    texts = repeating(0, [1, 70, 17, 40])
    engine = build(model, tokenizer, MODES[mode])
    idle = engine.cache.usage()
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 24)
    events = run(engine)
    found = [tokens(events[str(n)]) for n in range(len(texts))]
    assert found == [uncached(model, text, 24) for text in texts]
    assert engine.speculation_counters().num_accepted_tokens > 0
    # The next turn goes on from snapshots that drafts passed.
    second = [*texts[1], *found[1], 5]
    again = submit(engine, "again", second, 4)
    assert tokens(run(engine)["again"]) == uncached(model, second, 4)
    assert again.num_cached_tokens >= 64
    assert is_idle(engine, idle)
    assert isinstance(engine._worker._verifier, DeviceVerifier)
    recorded = engine._worker._verifier._recorder
    assert capture is None or len(recorded.recorded) > 0


@pytest.mark.parametrize(("rule", "wanted"), [({}, 1), ({"temperature": 0.4, "seed": 1}, 3)])
def test_a_step_sends_little_to_the_device(
    rule: dict, wanted: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft's inputs in one copy; and rules and draws where any are drawn."""
    capture = FakeCapture()
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, **__: new_runner(model, storage, capture, (1, 2)),
    )
    sent, copies = [], []
    for owner, name in ((transfer, "_sent"), (Staging, "send")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), sent))
    engine = build(shared_model("lsf"), tokenizer, CHAIN)
    submit(engine, "a", [7, 8, 9] * 20, 40, **rule)
    while engine.has_work:
        drafts = engine.speculation_counters().num_drafts
        sent.clear()
        engine.step()
        if engine.speculation_counters().num_drafts > drafts:
            copies.append(len(sent))
    # A step that passes a border of blocks stores a state besides.
    assert min(copies) == statistics.median(copies) == wanted


def counted(function: Callable, calls: list[str]) -> Callable:
    def called(*args: object) -> object:
        calls.append(function.__name__)
        return function(*args)

    return called


@pytest.mark.parametrize("trees", [CHAINS, TREES], ids=["chains", "trees"])
@pytest.mark.parametrize("layers", LAYERS)
def test_two_drafts_in_a_row_are_as_without_a_device(layers: str, trees: list[DraftTree]) -> None:
    """The second call folds in what the first accepted, branches that moved among it."""
    found, paths = {}, [[0, 2] if trees is TREES else [0, 1], [0]]
    for name in ("device", "plain"):
        bench = Bench(shared_model(layers), (4,), trees, FakeCapture())
        verifier, drafts = getattr(bench, name), bench.start([0, 1])
        first = real_rows(verifier.run(drafts), drafts).clone()
        verifier.accept(list(zip(drafts, paths, strict=True)))
        later = [
            DraftRow.of(Row([3], d.row.past + len(p), d.row.state, d.row.pages, {}), d.tree)
            for d, p in zip(drafts, paths, strict=True)
        ]
        found[name] = torch.cat([first, real_rows(verifier.run(later), later)])
    known = [prompt(9 + 4 * n, seed=n) for n in range(2)]
    taken = [
        [*known[n], *(drafts[n].row.tokens[node] for node in path)] for n, path in enumerate(paths)
    ]
    honest, exact = (
        torch.cat([nodes_alone(model, known, drafts), nodes_alone(model, taken, later)])
        for model in (bench.model, copy.deepcopy(bench.model).double())
    )
    # Two honest runs in fp32, without a device: the larger error of each number is theirs.
    plain = found["plain"]
    is_worse = (plain - exact).abs() > (honest - exact).abs()
    check_error("logits", found["device"], torch.where(is_worse, plain, honest), exact)


@torch.inference_mode()
def nodes_alone(
    model: HybridModel, known: list[list[int]], drafts: Sequence[DraftRow]
) -> torch.Tensor:
    """The logits after each node of each draft, of a row that holds its path alone."""
    found = []
    for text, draft in zip(known, drafts, strict=True):
        for path in draft.tree.paths:
            row = [*text, *(draft.row.tokens[node] for node in path)]
            found.append(model(torch.tensor([row]))[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("trees", [CHAINS, TREES], ids=["chains", "trees"])
@pytest.mark.parametrize("layers", LAYERS)
def test_padding_and_what_buffers_held_change_no_bit(layers: str, trees: list[DraftTree]) -> None:
    quiet, noisy = (
        Bench(shared_model(layers), (4,), trees, FakeCapture()),
        Bench(shared_model(layers), (4,), trees, FakeCapture()),
    )
    drafts = quiet.start([0, 1])
    wanted = real_rows(quiet.device.run(drafts), drafts).clone()
    drafts = noisy.start([0, 1])
    # Another crowd passes through the same buffers, and the sink holds what no number is.
    crowd = noisy.start([2, 3, 4])
    noisy.device.run(crowd)
    noisy.device.accept([(draft, [0]) for draft in crowd])
    noisy.device.run(crowd)
    for layer in noisy.storage.layers:
        pools = [layer.k, layer.v] if isinstance(layer, KVStorage) else [layer.states]
        for pool in pools:
            pool[0] = float("nan")
    assert torch.equal(real_rows(noisy.device.run(drafts), drafts), wanted)


@pytest.mark.parametrize("trees", [CHAINS, TREES], ids=["chains", "trees"])
@pytest.mark.parametrize("layers", LAYERS)
def test_a_run_writes_to_its_rows_and_to_the_sink(layers: str, trees: list[DraftTree]) -> None:
    bench = Bench(shared_model(layers), (4,), trees, FakeCapture())
    drafts = bench.start([0, 1])
    slabs = bench.storage._arena.view(-1, bench.storage.layout.slab_bytes)
    before = slabs.clone()
    bench.device.run(drafts)
    changed = (slabs != before).any(-1).nonzero().flatten().tolist()
    # Places 9 to 13 and 13 to 14: the first page of each.
    states = [1, 2] if drafts[0].row.state else []
    pages = [8, 10] if any(isinstance(x, KVStorage) for x in bench.storage.layers) else []
    assert [slab for slab in changed if slab] == states + pages


def test_sizes_of_drafts() -> None:
    assert graphs.draft_token_sizes(2) == (2,)
    assert graphs.draft_token_sizes(6) == (2, 4, 6)
    assert graphs.draft_token_sizes(16) == (2, 4, 8, 16)
    bench = Bench(tiny_model("lf"), (2, 4), TREES, FakeCapture())
    drafts = bench.start([0, 1])
    bench.device.run(drafts)
    bench.device.run(drafts[1:])
    sizes = [(s.rows, s.tokens, s.pages) for s in bench.device._recorder.recorded]
    assert sizes == [(2, 8, 16), (2, 2, 16)]


@pytest.mark.parametrize("layers", LAYERS)
def test_warmed_up_its_drafts_record_nothing_and_hold_nothing(
    layers: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = FakeCapture()
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, **__: new_runner(model, storage, capture, (1, 2, 4)),
    )
    engine = build(shared_model(layers), tokenizer, CHAIN, max_running=4)
    worker = engine._worker
    slabs = worker.storage._arena.view(-1, worker.storage.layout.slab_bytes)
    slabs[1:] = 7
    engine.warm_up(lambda _: None)
    assert bool((slabs[1:] == 7).all())
    assert not worker._pending._accepted
    before = capture.recorded
    assert len(worker._verifier._recorder.recorded) == 9  # 1, 2, 4 rows of 2, 4, 6 tokens
    texts = repeating(0, [1, 70, 17, 40])
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 24)
    events = run(engine)
    found = [tokens(events[str(n)]) for n in range(len(texts))]
    assert found == [uncached(shared_model(layers), text, 24) for text in texts]
    assert engine.speculation_counters().num_accepted_tokens > 0
    assert capture.recorded == before
