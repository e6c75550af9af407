"""States in pools and keys in pages that sequences share: the same tokens as with states alone."""

import pytest
import torch
from model_cases import CPU, MOE, tiny_model, tokens
from torch import Tensor

from sevenfold.models import Batch, HybridModel, LayerState, PagedKV, PageTable, PooledState
from sevenfold.models import empty_state as empty_values
from sevenfold.ops import attention_paged
from sevenfold.ops.testing import check_error

PAGE_TOKENS, NUM_PAGES = 4, 24
SLOTS = torch.tensor([5, 2, 7])
PAGES = torch.tensor([[3, 17, 9, 20], [11, 4, 22, 0], [8, 1, 15, 6]])
MIXES = [{"layers": "lf"}, {"layers": "lsf"}, {"layers": "llf", "moe": MOE}]


def storage(model: HybridModel) -> list[tuple[torch.Tensor, ...]]:
    """Pools and pages full of what other requests left, the slots in use zeroed."""
    config, layers = model.config, []
    H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for kind in config.layer_types:
        if kind == "linear_attention":
            pool = torch.full((8, H, D, D), 7.0, dtype=model.dtype)
            pool[SLOTS] = 0
            layers.append((pool,))
        else:
            shape = (NUM_PAGES, PAGE_TOKENS, G, D)
            layers.append(tuple(torch.full(shape, 7.0, dtype=model.dtype) for _ in "kv"))
    return layers


def values(
    layers: list[tuple[torch.Tensor, ...]], batch: Batch, *, on_device: bool = False
) -> tuple[LayerState, ...]:
    """on_device: lengths lie where a GPU's operators look for them, too."""
    row = torch.repeat_interleave(torch.arange(3), torch.tensor(batch.lengths))
    position = batch.positions.flatten()
    page = PAGES[row, position // PAGE_TOKENS]
    lengths = (torch.tensor(batch.totals), batch.cu_seqlens) if on_device else ()
    table = PageTable(PAGES, page, position % PAGE_TOKENS, *lengths)
    return tuple(
        PooledState(*layer, SLOTS) if len(layer) == 1 else PagedKV(*layer, table)
        for layer in layers
    )


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix["layers"])
def test_shared_storage_equals_states_of_one_s_own(mix: dict) -> None:
    model, exact_model = tiny_model(dtype=torch.float32, **mix), tiny_model(**mix)
    layers = storage(model)
    untouched = [storage.clone() for layer in layers for storage in layer]
    own, exact = (
        empty_values(m.config, 3, 16, device=CPU, dtype=m.dtype) for m in (model, exact_model)
    )
    past = [0, 0, 0]
    for i, lengths in enumerate([(5, 0, 2), (3, 7, 1), (1, 1, 1), (1, 1, 1), (6, 3, 5)]):
        ids = tokens(1, sum(lengths), seed=i)
        batch = Batch.packed(lengths, past=past, device=CPU)
        with torch.no_grad():
            alone = model.hidden(ids, batch, own)
            shared = model.hidden(ids, batch, values(layers, batch))
            single = exact_model.hidden(ids, batch, exact)
        check_error("hidden", shared.hidden, alone.hidden, single.hidden)
        own, exact = alone.state, single.state
        past = [p + n for p, n in zip(past, lengths, strict=True)]
    others = [n for n in range(8) if n not in SLOTS]
    pages = [n for n in range(NUM_PAGES) if n not in PAGES]
    for before, now in zip(untouched, [s for layer in layers for s in layer], strict=True):
        rest = others if len(now) == 8 else pages
        assert torch.equal(now[rest], before[rest]), "storage of others must stay as it is"


ENDS = [
    {"layers": "lf"},
    {"layers": "fl", "norm_placement": "pre_norm", "linear_attn_norm_groups": 2},
    {"layers": "fs", "norm_placement": "pre_norm"},
    {"layers": "lff", "moe": MOE},
]


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("mix", ENDS, ids=lambda mix: mix["layers"])
def test_the_last_tokens_alone_are_as_among_all(mix: dict, on_device: bool) -> None:
    model, exact_model = tiny_model(dtype=torch.float32, **mix), tiny_model(**mix)
    models = (model, model, exact_model)
    stored = [storage(one) for one in models]
    past = [0, 0, 0]
    for i, lengths in enumerate([(5, 1, 2), (3, 7, 1)]):
        ids, batch = tokens(1, sum(lengths), seed=i), Batch.packed(lengths, past=past, device=CPU)
        ends = torch.tensor(lengths).cumsum(0) - 1
        with torch.no_grad():
            found, whole, exact = (values(layers, batch, on_device=on_device) for layers in stored)
            found = model.hidden_at_ends(ids, batch, found, ends).hidden
            whole, exact = (
                one.hidden(ids, batch, state).hidden[0, ends, None]
                for one, state in zip(models[1:], (whole, exact), strict=True)
            )
        check_error("hidden", found, whole, exact)
        past = [p + n for p, n in zip(past, lengths, strict=True)]
    # States, keys and values are of all tokens.
    for one, other in zip(stored[0], stored[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Twice(torch.nn.Module):
    """A mixer in another's place, which has a forward alone."""

    def __init__(self, plain: torch.nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor, batch: Batch, state: LayerState) -> tuple[Tensor, LayerState]:
        return 2 * self.plain(x, batch, state)[0], state


@pytest.mark.parametrize("whole_mixer", [True, False])
def test_a_mixer_or_a_forward_that_is_replaced_runs(whole_mixer: bool) -> None:
    model = tiny_model("fl" if whole_mixer else "lf", dtype=torch.float32)
    mixer = model.layers[-1].self_attn
    if whole_mixer:
        model.layers[-1].self_attn = Twice(mixer)
    else:
        forward, mixer.forward = mixer.forward, lambda *args: (2 * forward(*args)[0], args[2])
    ids, batch, ends = tokens(1, 9), Batch.packed((4, 2, 3), device=CPU), torch.tensor([3, 5, 8])
    with torch.no_grad():
        whole = model.hidden(ids, batch, values(storage(model), batch, on_device=True)).hidden
        state = values(storage(model), batch, on_device=True)
        found = model.hidden_at_ends(ids, batch, state, ends).hidden
    check_error("hidden", found[:, 0], whole[0, ends], whole[0, ends].double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": torch.zeros(2, 4, dtype=torch.int64)}, r"pages must have shape \[N, M\]"),
        ({"key_lengths": (17, 1, 1)}, "pages must have room for 17 keys, got 4 pages"),
        ({"v_pages": torch.zeros(NUM_PAGES, 3, 1, 6)}, "v_pages must have shape"),
    ],
)
def test_paged_attention_refuses(change: dict, message: str) -> None:
    pages = torch.zeros(NUM_PAGES, PAGE_TOKENS, 1, 6)
    case = {"k_pages": pages, "v_pages": pages, "pages": PAGES} | change
    keys = case.pop("key_lengths", (3, 1, 1))
    with pytest.raises(ValueError, match=message):
        attention_paged(
            torch.zeros(1, 3, 2, 6), **case, lengths=(1, 1, 1), key_lengths=keys, scale=1.0
        )
