"""What only a GPU shows of the engine's runner: graphs, no waiting, the same bits in company."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from device_helpers import Places, new_storage, prompt
from engine_helpers import MOE, tiny_model, uncached
from test_engine import build, prompts, run, submit, tokens
from tokenizers import Tokenizer
from torch.profiler import ProfilerActivity, profile

from sevenfold.engine.device import CudaCapture, DeviceRunner, decode_batch_sizes, graph_bytes
from sevenfold.engine.rows import Row
from sevenfold.engine.runner import Runner
from sevenfold.engine.transfer import Arriving, side_by_side, upload
from sevenfold.models import HybridModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*has no tuning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
GPU = torch.device("cuda", 0)
MIXES = ["ll", "ff", "lsf", "lllf"]
# Widths that every kernel takes.
WIDTHS = {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDTHS |= {"intermediate_size": 64, "rotary_dim": 32, "max_position_embeddings": 400}


def gpu_model(mix: str, dtype: torch.dtype = torch.bfloat16, **fields: object) -> HybridModel:
    return tiny_model(mix, dtype=dtype, **(WIDTHS | fields)).to(GPU)


def new_runner(model: HybridModel, storage: object, sizes: tuple[int, ...]) -> DeviceRunner:
    capture = CudaCapture(GPU) if sizes else None
    return DeviceRunner(model, storage, page_tokens=16, batch_sizes=sizes, capture=capture)


def start(runner: DeviceRunner, storage: object, numbers: list[int]) -> list[Row]:
    """Rows of requests by their numbers, 0 to 4, whose prompts the runner has seen."""
    places, rows = Places(storage), []
    for n in numbers:
        where = (places.state(n + 1), places.pages(n), {})
        runner.run([Row(prompt(9 + 3 * n, seed=n), 0, *where)])
        rows.append(Row([7 + n], 9 + 3 * n, *where))
    return rows


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mix", MIXES)
def test_the_engine_gives_the_same_tokens_in_fp32(mix: str, tokenizer: Tokenizer) -> None:
    # Products in full fp32: TF32 would choose other tokens.
    model = gpu_model(mix, torch.float32)
    twin = tiny_model(mix, **WIDTHS)
    texts = prompts(0, [1, 70, 3, 17, 16])
    engine = build(model, tokenizer, max_step_tokens=300, max_running=5)
    assert isinstance(engine._worker.runner, DeviceRunner)
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 12)
    events = run(engine)
    found = [tokens(events[str(n)]) for n in range(len(texts))]
    assert found == [uncached(twin, text, 12) for text in texts]


@pytest.mark.parametrize("mix", MIXES)
def test_steps_begun_ahead_give_the_events_of_steps_in_turn(mix: str, tokenizer: Tokenizer) -> None:
    model = gpu_model(mix, torch.float32)
    texts, found = prompts(0, [1, 70, 3, 17, 16]), []
    for ahead in (True, False):
        engine = build(model, tokenizer, max_step_tokens=300, max_running=5)
        if not ahead:
            engine._worker.ahead = None
        for n, text in enumerate(texts):
            options = {"temperature": 0.9, "seed": n, "presence_penalty": 0.5} if n % 2 else {}
            submit(engine, str(n), text, 20 + 9 * n, stop_token_ids=tuple(range(12)), **options)
        steps = []
        while engine.has_work:
            steps.append(engine.step())
            engine.cancel("4" if len(steps) == 9 else "nobody")
        found.append(steps)
    assert found[0] == found[1]


def test_nothing_waits_in_a_step_but_for_its_tokens(tokenizer: Tokenizer) -> None:
    engine = build(gpu_model("lsf", torch.float32), tokenizer, max_running=4)
    for n, text in enumerate(prompts(1, [9, 20, 30])):
        options = {"temperature": 0.9, "seed": n, "presence_penalty": 0.5} if n else {}
        submit(engine, str(n), text, 40, **options)
    for _ in range(6):
        engine.step()
    with no_waiting():
        for _ in range(8):
            engine.step()
            assert engine._ahead.chosen is not None


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_a_step_ahead_copies_nothing_but_its_tokens(tokenizer: Tokenizer) -> None:
    engine = build(gpu_model("lsf", torch.float32), tokenizer, max_running=4)
    for n, text in enumerate(prompts(1, [9, 20, 30])):
        submit(engine, str(n), text, 40)
    for _ in range(6):
        engine.step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(8):
            engine.step()
        torch.cuda.synchronize()
    ran = [event.name for event in found.events()]
    assert sum("DtoH" in name for name in ran) == 8
    assert not any("HtoD" in name for name in ran)


@pytest.mark.parametrize("mix", [*MIXES, "moe"])
def test_a_graph_gives_the_bits_of_the_same_step_without(mix: str) -> None:
    fields = {"moe": MOE} if mix == "moe" else {}
    model = gpu_model("llf" if mix == "moe" else mix, **fields)
    results = []
    for sizes in [(), (3,)]:
        storage = new_storage(model)
        runner = new_runner(model, storage, sizes)
        rows = start(runner, storage, [0, 1, 2])
        steps = [Row([5 + i], r.past + i, r.state, r.pages, {}) for r in rows for i in (0, 1, 2)]
        results.append([runner.run(steps[i::3]).clone() for i in range(3)])
    for plain, graphed in zip(*results, strict=True):
        assert torch.equal(plain, graphed)


@pytest.mark.parametrize("mix", MIXES)
def test_one_size_gives_the_same_bits_in_any_company(mix: str) -> None:
    model = gpu_model(mix)
    alone, together = new_storage(model), new_storage(model)
    runner = new_runner(model, alone, (4,))
    wanted = runner.run(start(runner, alone, [1])).clone()
    runner = new_runner(model, together, (4,))
    rows = start(runner, together, [0, 1, 2])
    assert torch.equal(runner.run(rows)[1], wanted[0])


def after_warm_up(call: Callable[[], object]) -> None:
    """Call it until kernels are compiled and tables are on the device, then without waiting."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with no_waiting():
        call()


@pytest.mark.parametrize("mix", [*MIXES, "moe"])
def test_nothing_waits_inside_a_run(mix: str) -> None:
    fields = {"moe": MOE} if mix == "moe" else {}
    model = gpu_model("llf" if mix == "moe" else mix, **fields)
    storage = new_storage(model)
    places, runner = Places(storage), new_runner(model, storage, (4,))
    rows = start(runner, storage, [0, 1])
    kept = {} if places.state(1) is None else {rows[0].past + 1: places.snapshot(0)}
    rows[0] = Row(rows[0].tokens, rows[0].past, rows[0].state, rows[0].pages, kept)
    after_warm_up(lambda: runner.run(rows))
    snapshots = {} if places.state(3) is None else {16: places.snapshot(1), 20: places.snapshot(2)}
    long = Row(prompt(20, 3), 0, places.state(3), places.pages(2), snapshots)
    after_warm_up(lambda: runner.run([long, Row(prompt(5, 4), 0, *where(places, 3))]))


def where(places: Places, n: int) -> tuple:
    return places.state(n + 1), places.pages(n), {}


def test_a_new_cut_of_a_prefill_does_not_wait_either() -> None:
    model = gpu_model("lllf")
    storage = new_storage(model)
    places, runner = Places(storage), new_runner(model, storage, ())
    rows = [Row(prompt(n, n), 0, *where(places, 0)) for n in (19, 20, 21)]
    after_warm_up(lambda: runner.run(rows[:1]))
    with no_waiting():
        runner.run(rows[1:2])


def test_snapshots_inside_a_prefill_keep_to_a_cut_prefill_s() -> None:
    model = gpu_model("lf", torch.float32)
    storage, cut = new_storage(model), new_storage(model)
    places, text = Places(storage), prompt(30, 1)
    kept = {16: places.snapshot(0), 30: places.snapshot(1)}
    row = Row(text, 0, places.state(1), places.pages(0), kept)
    new_runner(model, storage, ()).run([row])
    Runner(model, cut, page_tokens=16).run([row])
    for slot in kept.values():
        found, wanted = storage.layers[0].snapshots.exact[slot], cut.layers[0].snapshots.exact[slot]
        eps = torch.finfo(torch.float32).eps
        assert (found - wanted).abs().max() <= 64 * eps * wanted.abs().max()


def test_graphs_take_no_more_than_was_set_aside() -> None:
    # So many that logits of every size would take more than all that was set aside.
    vocabulary, sizes = {"vocab_size": 400_000}, decode_batch_sizes(64)
    model = gpu_model("lsf", hidden_size=512, num_attention_heads=16, **vocabulary)
    storage = new_storage(model)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(GPU)[0]
    runner = new_runner(model, storage, sizes)
    places = Places(storage)
    for rows in reversed(sizes):
        runner.run([Row([1], 3, *where(places, 0)[:2], {})] * rows)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    taken = before - torch.cuda.mem_get_info(GPU)[0]
    assert taken <= graph_bytes(model.config, 64, 0, element_bytes=2)


def test_the_choice_of_a_batch_comes_back_with_one_wait() -> None:
    with no_waiting():
        ids = upload([4, 5, 6], GPU)
    assert Arriving(side_by_side([ids, ids > 4])).numbers() == [[4, 5, 6], [0, 1, 1]]


def test_recorded_outputs_of_many_sizes_share_their_memory() -> None:
    capture, sizes = CudaCapture(GPU), (64, 48, 32, 16, 8)
    x, y = torch.randn(64, 1, device=GPU), torch.randn(50_000, device=GPU)
    held = torch.cuda.memory_allocated()
    recorded = {rows: capture(lambda rows=rows: x[:rows] * y) for rows in sizes}
    assert torch.cuda.memory_allocated() == held
    assert len({one.output.data_ptr() for one in recorded.values()}) == 1
    torch.cuda.empty_cache()
    for rows in (*sizes, *reversed(sizes)):
        x.normal_()
        recorded[rows].replay()
        assert torch.equal(recorded[rows].output, x[:rows] * y)


class Ring:
    """What only the collector of garbage frees: it holds itself."""

    def __init__(self, held: object) -> None:
        self.held, self.itself = held, self


def test_a_graph_that_nobody_holds_is_not_freed_while_another_is_recorded() -> None:
    x = torch.randn(64, device=GPU)
    before = gc.get_threshold()

    def run() -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            gc.set_threshold(1)
            assert [[] for _ in range(1000)]
        return x * 3

    gc.set_threshold(10**6)
    try:
        Ring(CudaCapture(GPU)(lambda: x * 2))
        captured = CudaCapture(GPU)(run)
    finally:
        gc.set_threshold(*before)
    captured.replay()
    assert torch.equal(captured.output, x * 3)
