"""What only a GPU shows of recorded prefills: graphs, no waiting, no number in padding."""

import copy
import random
from contextlib import nullcontext

import pytest
import torch
from device_helpers import new_storage, prompt
from engine_helpers import MOE
from test_device_gpu import GPU, MIXES, gpu_model, no_waiting
from test_engine import build, prompts, run, submit, tokens
from tokenizers import Tokenizer
from torch import Tensor

from sevenfold.engine.cache import Fresh
from sevenfold.engine.device import CudaCapture, DeviceRunner, graph_bytes, prefill_sizes
from sevenfold.engine.memory_layout import SINK, Tenant
from sevenfold.engine.rows import Row
from sevenfold.engine.runners import make_runner
from sevenfold.engine.storage import KVStorage, LinearStorage, Storage
from sevenfold.models import Batch, HybridModel, empty_state
from sevenfold.ops.testing import check_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*has no tuning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
SIZES = (16, 32, 128, 256, 384)
MOST_TOKENS, PAGE_TOKENS = 384, 16


def storage_of(model: HybridModel) -> Storage:
    return new_storage(model, num_slabs=70)


def new_runner(model: HybridModel, storage: Storage, sizes: tuple[int, ...]) -> DeviceRunner:
    return DeviceRunner(
        model,
        storage,
        page_tokens=PAGE_TOKENS,
        batch_sizes=(1,) if sizes else (),
        prefill_sizes=sizes,
        capture=CudaCapture(GPU) if sizes else None,
    )


def row_of(storage: Storage, text: list[int], past: int = 0, stops: tuple[int, ...] = ()) -> Row:
    """One request's new tokens; each of its items lies in a slab of its own."""
    places = storage.layout.places
    pages = [(8 + n) * places[Tenant.PAGE] for n in range(MOST_TOKENS // PAGE_TOKENS)]
    kept = {at: (40 + n) * places[Tenant.SNAPSHOT] for n, at in enumerate(stops)}
    return Row(text, past, places[Tenant.STATE] or None, pages, kept)


def forget(storage: Storage) -> None:
    """Zero states and spoil the sink: the request begins anew."""
    for layer in storage.layers:
        if isinstance(layer, LinearStorage):
            layer.states[1:] = 0
            layer.states[SINK] = float("nan")
        elif isinstance(layer, KVStorage):
            layer.k[SINK] = layer.v[SINK] = float("nan")


def exact_after(model: HybridModel, text: list[int]) -> tuple[Tensor, list[Tensor | None]]:
    """Logits and states in fp64, by a CPU."""
    twin, cpu = copy.deepcopy(model).cpu().double(), torch.device("cpu")
    start = empty_state(model.config, 1, len(text), device=cpu, dtype=torch.float64)
    after = twin.hidden(torch.tensor([text]), Batch.rows(1, len(text), device=cpu), start)
    states = [getattr(state, "kv", None) for state in after.state or ()]
    logits = twin.logits(after.hidden[:, -1]).to(GPU)
    return logits, [None if kv is None else kv[0].to(GPU) for kv in states]


@pytest.mark.parametrize("lengths", [(2, 9, 16, 17, 32), (127, 128), (129, 256, 300, 384)])
@pytest.mark.parametrize("mix", MIXES)
def test_recorded_prefills_keep_to_those_that_are_not(mix: str, lengths: tuple[int, ...]) -> None:
    model = gpu_model(mix)
    recorded, plain = storage_of(model), storage_of(model)
    graphs, eager = new_runner(model, recorded, SIZES), new_runner(model, plain, ())
    # The largest error of some lengths: that of one position's few logits is a matter of chance.
    logits: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for length in lengths:
        stops = () if mix == "ff" else tuple(sorted({1, length // 2, length}))
        text = prompt(length, length)
        forget(recorded)
        forget(plain)
        found = graphs.run([row_of(recorded, text, stops=stops)]).clone()
        honest = eager.run([row_of(plain, text, stops=stops)])
        exact, states = exact_after(model, text)
        for kind, values in zip(logits, (found, honest, exact), strict=True):
            kind.append(values)
        slot = row_of(recorded, text).state
        for ours, other, wanted in zip(recorded.layers, plain.layers, states, strict=True):
            if wanted is not None:
                pair = (ours.states[slot], other.states[slot].to(model.dtype))
                check_error(f"state after {length}", *pair, wanted)
    check_error("logits", *(torch.cat(values) for values in logits))


@pytest.mark.parametrize("mix", ["lsf", "lllf"])
def test_snapshots_inside_are_the_states_of_their_prefixes(mix: str) -> None:
    model = gpu_model(mix)
    recorded, plain = storage_of(model), storage_of(model)
    graphs, eager = new_runner(model, recorded, SIZES), new_runner(model, plain, ())
    text, stops = prompt(300, 3), (1, 63, 64, 65, 200, 299)
    for storage, runner in ((recorded, graphs), (plain, eager)):
        forget(storage)
        runner.run([row_of(storage, text, stops=stops)])
    for at, slot in row_of(recorded, text, stops=stops).snapshots.items():
        _, states = exact_after(model, text[:at])
        for ours, other, wanted in zip(recorded.layers, plain.layers, states, strict=True):
            if wanted is not None:
                found, honest = (one.snapshots.exact[slot] for one in (ours, other))
                check_error(f"after {at}", found, honest.to(model.dtype), wanted)


@pytest.mark.parametrize("mix", ["lllf", "ll"])
def test_a_hundred_prompts_of_random_lengths_and_chunks(mix: str) -> None:
    model, lengths = gpu_model(mix), random.Random(0)
    recorded, plain = storage_of(model), storage_of(model)
    graphs, eager = new_runner(model, recorded, SIZES), new_runner(model, plain, ())
    found, honest, exact = [], [], []
    for n in range(100):
        text = prompt(lengths.randint(4, MOST_TOKENS), n)
        cut = lengths.choice([0, lengths.randint(1, len(text) - 2)])
        for storage, runner, logits in ((recorded, graphs, found), (plain, eager, honest)):
            forget(storage)
            if cut:
                runner.run([row_of(storage, text[:cut])])
            logits.append(runner.run([row_of(storage, text[cut:], cut)]).clone())
        exact.append(exact_after(model, text)[0])
    check_error("logits", *(torch.cat(rows) for rows in (found, honest, exact)))


@pytest.mark.parametrize("mix", [*MIXES, "moe"])
def test_a_graph_gives_the_bits_of_the_same_run_without(mix: str) -> None:
    fields = {"moe": MOE} if mix == "moe" else {}
    model = gpu_model("llf" if mix == "moe" else mix, **fields)
    storage = storage_of(model)
    runner = new_runner(model, storage, SIZES)
    for length in (300, 129, 250, 256, 12, 16, 20):
        row = row_of(storage, prompt(length, length))
        forget(storage)
        replayed = runner.run([row]).clone()
        forget(storage)
        inputs = runner._new_prefill_inputs(runner._prefills.size_of([row]))
        inputs.fill(row, storage.words.places((), None, row.state))
        with torch.inference_mode():
            assert torch.equal(runner._prefill_step(inputs), replayed)
        assert bool(torch.isfinite(replayed).all())


@pytest.mark.parametrize("mix", [*MIXES, "moe"])
def test_nothing_waits_inside_a_recorded_prefill(mix: str) -> None:
    fields = {"moe": MOE} if mix == "moe" else {}
    model = gpu_model("llf" if mix == "moe" else mix, **fields)
    storage = storage_of(model)
    runner = new_runner(model, storage, SIZES)
    stops = () if mix == "ff" else (16, 200)
    runner.run([row_of(storage, prompt(200, 1))])
    torch.cuda.synchronize()
    with no_waiting():
        runner.run([row_of(storage, prompt(210, 2), stops=stops)])
        runner.run([row_of(storage, prompt(131, 3))])


def test_recordings_take_no_more_than_was_set_aside() -> None:
    model = gpu_model("lsf", hidden_size=512, num_attention_heads=16, vocab_size=4000)
    storage = storage_of(model)
    sizes = (256, 1024, 4096)
    text = prompt(300, 1)
    new_runner(model, storage, ()).run([row_of(storage, text)])  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(GPU)[0]
    runner = new_runner(model, storage, sizes)
    for length in (200, 300):
        runner.run([row_of(storage, text[:length])])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    taken = before - torch.cuda.mem_get_info(GPU)[0]
    assert set(runner._prefills._recorder.recorded) == set(sizes)
    assert taken <= graph_bytes(model.config, 1, sizes[-1], element_bytes=2)


def test_which_models_have_recorded_prefills() -> None:
    model = gpu_model("lf")
    runner = make_runner(model, storage_of(model), (PAGE_TOKENS, 4), None)
    sizes = (16, 32, 64, 80, 96, 112, 128, 256, 512)
    assert runner._prefills._sizes == prefill_sizes(model.config) == sizes
    one = make_runner(model, storage_of(model), (PAGE_TOKENS, 4), None, invariant=True)
    assert one._prefills is None
    assert make_runner(model, storage_of(model), (PAGE_TOKENS, 4), ())._prefills is None
    exact = gpu_model("lf", torch.float32)
    assert make_runner(exact, storage_of(exact), (PAGE_TOKENS, 4), None)._prefills is None


def test_the_engine_gives_the_tokens_of_an_engine_without(tokenizer: Tokenizer) -> None:
    # In bf16 two tokens may be too near each other to ask for; in fp32 softmax layers are recorded.
    model = gpu_model("fsf", torch.float32)
    found = []
    for keeps in (True, False):
        engine = build(model, tokenizer, max_step_tokens=300, max_running=5)
        assert engine._worker.runner._prefills is not None
        if not keeps:
            engine._worker.runner._prefills = None
        events = {}
        for n, text in enumerate(prompts(0, [2, 70, 31, 17, 80])):
            submit(engine, str(n), text, 12)
            events |= run(engine)
        found.append({name: tokens(one) for name, one in events.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("mix", MIXES)
def test_a_recording_reads_a_state_and_clears_pages_as_calls_do(mix: str) -> None:
    model = gpu_model(mix)
    storage, plain = storage_of(model), storage_of(model)
    ready, called = (new_runner(model, one, SIZES) for one in (storage, plain))
    text = prompt(40, 7)
    for past in (0, 16):  # the second finds other pages in the buffers
        row = row_of(storage, text[past:], past)
        has_states, page = row.state is not None, storage.layout.places[Tenant.PAGE]
        snapshot = 2 * storage.layout.places[Tenant.SNAPSHOT] if has_states else None
        fresh = Fresh([], list(row.pages[:3]) if page else [])
        slab = storage.layout.slab_bytes
        noise = torch.randn(storage._arena[slab:].numel() // 4, device=GPU)
        for one in (storage, plain):
            one._arena[slab:] = noise.view(torch.uint8)
        with no_waiting() if past else nullcontext():
            found = ready.run_readied(row, fresh, snapshot)
            plain.zero(fresh)
            if row.state is not None:
                plain.restore([snapshot], [row.state])
            wanted = called.run([row])
        assert torch.equal(found.logits, wanted)
        assert torch.equal(storage._arena[slab:], plain._arena[slab:])
        assert found.best[0, 0] == wanted.argmax()
