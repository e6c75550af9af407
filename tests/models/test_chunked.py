"""Long rows by chunks: the same logits as at once, in inference on a CPU only."""

import pytest
import torch
from model_cases import CPU, MOE, by_other_products, furthest, tiny_model, tokens

from sevenfold.models import Batch, chunked, empty_state, hybrid
from sevenfold.models.chunked import pays_by_chunks, run_by_chunks
from sevenfold.models.state import LayerState
from sevenfold.ops.testing import check_error

MIXES = [
    {"layers": "ll"},
    {"layers": "fs"},
    {"layers": "lsf", "moe": MOE},
    {"layers": "lf", "norm_placement": "pre_norm"},
]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Eight tokens to a chunk; the shapes of what ran by chunks."""
    shapes = []

    def recorded(layer: torch.nn.Module, x: torch.Tensor, state: LayerState) -> None:
        shapes.append(x.shape)
        run_by_chunks(layer, x, state)

    monkeypatch.setattr(chunked, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(hybrid, "run_by_chunks", recorded)
    return shapes


@pytest.mark.parametrize(("B", "T"), [(1, 9), (1, 24), (2, 13), (3, 70), (9, 2)])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix["layers"])
def test_chunks_equal_the_whole_row(mix: dict, B: int, T: int, runs: list) -> None:
    ids = tokens(B, T)
    single = tiny_model(dtype=torch.float32, **mix)
    exact, whole = tiny_model(**mix)(ids), single(ids)
    honest = furthest(exact, whole, by_other_products(single, ids))
    assert runs == []
    with torch.no_grad():
        found = single(ids)
    assert runs == [(B, T, 8)] * len(mix["layers"])
    check_error("logits", found, honest, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_carried_state_keeps_its_precision(dtype: torch.dtype, runs: list) -> None:
    ids, model = tokens(1, 90), tiny_model("ll", dtype)
    exact, whole = tiny_model("ll")(ids), model(ids)
    with torch.no_grad():
        found = model(ids)
    assert len(runs) == 2
    honest = furthest(exact, whole.to(dtype), by_other_products(model, ids).to(dtype))
    check_error("logits", found.to(dtype), honest, exact)


def test_inference_of_long_rows_pays() -> None:
    D, long = 2, chunked.CHUNK_TOKENS + 1
    x, batch = torch.zeros(1, long, D), Batch.rows(1, long, device=CPU)
    packed = Batch.packed([long - 1, 1], device=CPU)
    short = torch.zeros(1, long - 1, D)
    assert not pays_by_chunks(x, batch)  # a gradient may be wanted
    with torch.no_grad():
        assert pays_by_chunks(x, batch)
        assert not pays_by_chunks(short, Batch.rows(1, long - 1, device=CPU))
        assert not pays_by_chunks(x, packed)
        assert not pays_by_chunks(x.to("meta"), batch)


def test_training_and_cached_runs_stay_whole(runs: list) -> None:
    model, ids = tiny_model("lf", torch.float32, moe=MOE), tokens(1, 30)
    expected = model(ids)
    state = empty_state(model.config, 1, 30, device=CPU, dtype=model.dtype)
    with torch.no_grad():
        cached = model.hidden(ids, Batch.rows(1, 30, device=CPU), state)
        trained = model.train().hidden(ids)
    assert runs == []
    assert len(trained.router) == 2
    assert torch.equal(model.logits(trained.hidden), expected)
    assert len(cached.state) == 2
