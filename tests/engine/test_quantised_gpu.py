"""What only a GPU shows of an engine with fewer bits: recorded steps, states advanced in place."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from device_helpers import new_storage, prompt
from engine_helpers import MOE, tiny_model
from test_device_gpu import GPU, gpu_model, new_runner, no_waiting, start
from test_low_precision_engine import logits_of

from sevenfold.engine.memory import plan_memory
from sevenfold.engine.quantised_weights import load_quantised_model
from sevenfold.engine.runner import Row
from sevenfold.engine.runners import is_recordable
from sevenfold.engine.storage import Storage
from sevenfold.models.accounting import WeightFormat
from sevenfold.models.checkpoint import save_model

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*has no tuning")]


@pytest.mark.parametrize("weights", ["int8", "int8-experts", "fp8"])
def test_a_graph_holds_steps_with_8_bit_weights(tmp_path: Path, weights: WeightFormat) -> None:
    save_model(gpu_model("llf", moe=MOE).cpu(), tmp_path / "a")
    model = load_quantised_model(tmp_path / "a", weights, device=GPU)
    assert is_recordable(model)
    results = []
    for sizes in [(), (3,)]:
        storage = new_storage(model)
        runner = new_runner(model, storage, sizes)
        rows = start(runner, storage, [0, 1, 2])
        steps = [Row([5 + i], r.past + i, r.state, r.pages, {}) for r in rows for i in (0, 1, 2)]
        found = [runner.run(steps[0::3]).clone()]
        with no_waiting():
            found += [runner.run(steps[i::3]).clone() for i in (1, 2)]
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "dtypes",
    [{"state_dtype": "fp16"}, {"state_dtype": "int8"}, {"snapshot_dtype": "int8"}],
    ids=["fp16", "int8", "snapshots"],
)
def test_a_graph_holds_steps_over_states_in_fewer_bits(dtypes: dict) -> None:
    model, results = gpu_model("lllf"), []
    size = {"budget_bytes": 1 << 23, "context_tokens": 64, "page_tokens": 16}
    plan = plan_memory(model.config, **size, kv_element_bytes=2, **dtypes)
    places = plan.layout.places
    for sizes in [(), (3,)]:
        storage = Storage(model.config, plan, device=GPU, dtype=model.dtype)
        runner = new_runner(model, storage, sizes)
        found, rows = [], []
        for n in range(3):
            pages = [(8 + 2 * n + page) * places[1] for page in range(2)]
            rows.append(Row(prompt(9 + n, n), 0, (n + 1) * places[0], pages, {}, seed=n + 2**63))
            runner.run(rows[-1:])
        # Past the end of an int8 ring, where it is folded into its state.
        for i in range(20):
            step = [Row([i], r.end + i, r.state, r.pages, {}, seed=r.seed) for r in rows]
            with no_waiting() if i > 1 else nullcontext():
                found.append(runner.run(step).clone())
        results.append(torch.stack(found))
    assert torch.equal(*results)
    assert bool(torch.isfinite(results[0]).all())


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_states_in_place_give_what_they_give_on_a_cpu(dtype: str) -> None:
    """Near enough: rounding may go the other way where sums differ in their last bits."""
    on_cpu = tiny_model("lllf", head_dim=16, rotary_dim=8, max_position_embeddings=200)
    ids = list(range(5, 65))
    wanted = logits_of(on_cpu, ids, state_dtype=dtype)
    exact = logits_of(on_cpu, ids)
    found = logits_of(on_cpu.to(GPU), ids, state_dtype=dtype).cpu()
    spread = (wanted - exact).norm(dim=-1).median()
    assert (found - exact).norm(dim=-1).median() < 2 * spread
