"""Drafts in a model: every node is what its path gives; an accepted path is as if it had run."""

import pytest
import torch
from model_cases import CPU, MOE, tiny_model, tokens

from sevenfold.models import (
    Batch,
    DraftedState,
    DraftLayout,
    HybridModel,
    PagedTree,
    PageTable,
    empty_state,
    select_sequences,
)
from sevenfold.ops import ReplayPool
from sevenfold.ops.testing import check_error

MIXES = [{"layers": "lf"}, {"layers": "lsl"}, {"layers": "llf", "moe": MOE}]
PATHS = [[(0,), (0, 1), (0, 2), (0, 2, 3)], [(0,), (0, 1)]]
TAKEN, SLOTS, PAGES, PAGE = [(0, 2, 3), (0,)], [4, 1], [[3, 1, 6], [5, 2, 0]], 8


def storage(model: HybridModel) -> list:
    config, H, D = model.config, model.config.num_attention_heads, model.config.head_dim
    pages = (8, PAGE, config.num_key_value_heads, D)
    return [
        ReplayPool.zeros(6, H, (D, D), ring_tokens=5, dtype=model.dtype)
        if kind == "linear_attention"
        else tuple(torch.zeros(pages, dtype=model.dtype) for _ in "kv")
        for kind in config.layer_types
    ]


def drafted(layers: list, past: list[int], accepted: list | None) -> tuple[tuple, Batch]:
    depths = [[len(path) - 1 for path in paths] for paths in PATHS]
    sees = torch.eye(4, dtype=torch.bool).repeat(2, 1, 1)
    for n, paths in enumerate(PATHS):
        for node, path in enumerate(paths):
            sees[n, node, list(path)] = True
    row = torch.tensor([0, 0, 0, 0, 1, 1])
    token = torch.tensor(
        [p + t for p, paths in zip(past, PATHS, strict=True) for t in range(len(paths))]
    )
    pages = torch.tensor(PAGES)
    table = PageTable(pages, pages[row, token // PAGE], token % PAGE)
    taken = None if accepted is None else torch.tensor(accepted, dtype=torch.int32)
    layout = DraftLayout(4, torch.tensor([0, 1, 2, 3, 4, 5]), taken, sees)
    values = tuple(
        DraftedState(layer, torch.tensor(SLOTS), layout)
        if isinstance(layer, ReplayPool)
        else PagedTree(*layer, table, sees)
        for layer in layers
    )
    return values, Batch.drafts(depths, past=past, device=CPU)


def by_paths(model: HybridModel, ids: list, known: list[list[int]]) -> torch.Tensor:
    """Every node's vector, its path run behind what is known."""
    outputs = []
    for n, paths in enumerate(PATHS):
        for path in paths:
            row = torch.tensor([[*known[n], *(ids[n][t] for t in path)]])
            state = empty_state(model.config, 1, 24, device=CPU, dtype=model.dtype)
            outputs.append(
                model.hidden(row, Batch.rows(1, row.shape[1], device=CPU), state).hidden[0, -1]
            )
    return torch.stack(outputs)[None]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix["layers"])
def test_drafts_equal_their_paths(mix: dict) -> None:
    model, exact_model = tiny_model(dtype=torch.float32, **mix), tiny_model(**mix)
    layers, known = storage(model), [[], []]
    accepted, steps = None, []
    for step in range(3):
        flat = tokens(1, 6, seed=step)
        ids = [flat[0, :4].tolist(), flat[0, 4:].tolist()]
        with torch.no_grad():
            values, batch = drafted(layers, [len(k) for k in known], accepted)
            found = model.hidden(flat, batch, values).hidden
            honest, exact = by_paths(model, ids, known), by_paths(exact_model, ids, known)
        steps.append((found, honest, exact))
        for n, path in enumerate(TAKEN):
            move_keys(layers, PAGES[n], len(known[n]), path)
            known[n] += [ids[n][t] for t in path]
        accepted = [[*path, *(-1,) * (3 - len(path))] for path in TAKEN]
    # All steps at once: a few numbers of one step say little of fp32's own error.
    check_error("hidden", *(torch.stack(part) for part in zip(*steps, strict=True)))


def move_keys(layers: list, pages: list[int], past: int, path: tuple[int, ...]) -> None:
    for layer in layers:
        for stored in () if isinstance(layer, ReplayPool) else layer:
            kept = [stored[pages[(past + t) // PAGE], (past + t) % PAGE].clone() for t in path]
            for n, key in enumerate(kept):
                stored[pages[(past + n) // PAGE], (past + n) % PAGE] = key


def test_drafts_do_not_own_their_state() -> None:
    model = tiny_model(layers="lf", dtype=torch.float32)
    values, _ = drafted(storage(model), [0, 0], None)
    with pytest.raises(TypeError, match="to be selected from, got DraftedState"):
        select_sequences(values, torch.tensor([0]))
