"""A prompt behind a cached prefix: its state is read and its pages are cleared by its recording."""

import pytest
import torch
from device_helpers import PAGE_TOKENS, FakeCapture, Places, new_runner, new_storage, prompt
from engine_helpers import tiny_model, uncached
from test_engine import MIXES, build, prompts, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.engine import worker as worker_module
from sevenfold.engine.cache import Copy, Fresh
from sevenfold.engine.item_words import MOST_CLEARED
from sevenfold.engine.memory import plan_memory
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.rows import Row
from sevenfold.engine.storage import KVStorage, Storage

SIZES = (8, 16)


def dirty(storage: Storage) -> None:
    """Every item but the sink's holds numbers that would be seen."""
    generator = torch.Generator().manual_seed(0)
    slab = storage.layout.slab_bytes
    rest = storage._arena[slab:].view(torch.float32)
    rest.copy_(torch.randn(len(rest), generator=generator))
    for layer in storage.layers:
        if isinstance(layer, KVStorage):
            layer.v[Places(storage).pages(0)] = float("nan")


@pytest.mark.parametrize("mix", MIXES)
def test_one_launch_gives_what_the_calls_give(mix: str) -> None:
    model = tiny_model(mix)
    storage, plain = new_storage(model), new_storage(model)
    for one in (storage, plain):
        dirty(one)
    places = Places(storage)
    state, pages, snapshot = places.state(1), places.pages(0), places.snapshot(2)
    has_states = state is not None
    row = Row(prompt(7, 1), 0, state, pages, {5: places.snapshot(3)} if has_states else {})
    fresh = Fresh([], pages if storage.layout.places[Tenant.PAGE] else [])
    runners = [new_runner(model, x, FakeCapture(), (1,), SIZES) for x in (storage, plain)]
    found = runners[0].run_readied(row, fresh, snapshot if has_states else None)
    plain.zero(fresh)
    if state is not None:
        plain.restore([snapshot], [state])
    assert found is not None
    assert torch.equal(found.logits, runners[1].run([row]))
    assert found.best.tolist() == [[int(found.logits.argmax()), 1]]
    # Of the sink, padding's keys are all that may differ; nothing else was touched.
    slab = storage.layout.slab_bytes
    assert torch.equal(storage._arena[slab:], plain._arena[slab:])


def test_what_takes_more_than_a_launch_is_left_to_the_calls() -> None:
    model = tiny_model("lsf")
    storage = new_storage(model)
    runner, places = new_runner(model, storage, FakeCapture(), (1,), SIZES), Places(storage)
    row = Row(prompt(7, 1), 0, places.state(1), places.pages(0), {})
    before = storage._arena.clone()
    copy = Copy(Tenant.PAGE, 1, 1)
    for fresh in (
        Fresh([1], []),
        Fresh([], [*range(MOST_CLEARED + 1)]),
        Fresh([], [], saved=[copy]),
        Fresh([], [], loaded=[copy]),
    ):
        assert runner.run_readied(row, fresh, None) is None
    nothing = Fresh([], [])
    for tokens_ in ([3], prompt(17, 1)):  # a step, and more than any size
        other = Row(tokens_, 0, places.state(1), places.pages(0), {})
        assert runner.run_readied(other, nothing, None) is None
    assert new_runner(model, storage, None).run_readied(row, nothing, None) is None
    assert torch.equal(storage._arena, before)
    assert runner.run_readied(row, Fresh([], [*range(1, MOST_CLEARED + 1)]), None) is not None


@pytest.mark.parametrize(
    "options", [{"ring_tokens": 8}, {"snapshot_dtype": "fp16"}, {"state_dtype": "fp16"}]
)
def test_rings_and_fewer_bits_have_no_words(options: dict[str, object]) -> None:
    config = tiny_model("lsf").config
    size = {"context_tokens": 64, "page_tokens": PAGE_TOKENS, "kv_element_bytes": 4}
    plan = plan_memory(config, budget_bytes=1 << 22, **size, **options)
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    assert Storage(config, plan, **where).words is None


def test_a_second_turn_asks_for_no_copy_and_no_clearing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, **__: new_runner(
            model, storage, FakeCapture(), (1, 2), (8, 64, 128)
        ),
    )
    model = tiny_model("lsf", max_position_embeddings=200)
    engine = build(model, tokenizer, max_step_tokens=150, max_running=2)
    [text] = prompts(0, [70])
    submit(engine, "first", text, 5)
    second = [*text, *tokens(run(engine)["first"]), 5]
    asked: list[object] = []
    storage = engine._worker.storage
    zero, restore = storage.zero, storage.restore
    monkeypatch.setattr(storage, "zero", lambda f: asked.extend((*f.states, *f.pages)) or zero(f))
    monkeypatch.setattr(storage, "restore", lambda a, b: asked.extend(a) or restore(a, b))
    # With pages for an answer of 70 tokens.
    request = submit(engine, "second", second, 70)
    assert tokens(run(engine)["second"]) == uncached(model, second, 70)
    assert request.num_cached_tokens == 64
    assert asked == []
    # Beside another prompt there are two rows, which no recording holds.
    for n in range(2):
        submit(engine, f"side {n}", [*second, n], 3)
    found = run(engine)
    for n in range(2):
        assert tokens(found[f"side {n}"]) == uncached(model, [*second, n], 3)
    assert asked != []
