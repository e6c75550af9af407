"""Attention of draft trees over pages: every node as if its path alone followed."""

import pytest
import torch
from torch import Tensor

from sevenfold.ops import attention_paged_tree
from sevenfold.ops.attention import reference
from sevenfold.ops.testing import check_error

P, PAGE, H, G, D, V = 12, 4, 4, 2, 6, 5
PAGES = torch.tensor([[3, 7, 1, 9], [2, 8, 4, 11]])
PATHS = [
    [(0,), (0, 1), (0, 2), (0, 1, 3), (0, 2, 4), (0, 2, 4, 5)],
    [(0,), (0, 1), (0, 1, 2), (0, 3)],
]
LENGTHS, PAST = [6, 4], [7, 0]


def case(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 10, H, D), (P, PAGE, G, D), (P, PAGE, G, V)]
    return [torch.randn(s, generator=generator).bfloat16().to(dtype) for s in shapes]


def ancestors() -> Tensor:
    sees = torch.eye(6, dtype=torch.bool).repeat(2, 1, 1)
    for n, paths in enumerate(PATHS):
        for node, path in enumerate(paths):
            sees[n, node, list(path)] = True
    return sees


def by_paths(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """The last token of every path, run alone by the reference."""
    outputs, first = [], 0
    for n, paths in enumerate(PATHS):
        for node, path in enumerate(paths):
            places = torch.tensor([*range(PAST[n]), *(PAST[n] + t for t in path)])
            page, place = PAGES[n, places // PAGE], places % PAGE
            one = q[0, first + node][None]
            keys, values = k[page, place], v[page, place]
            o = reference.one_sequence(one, keys, values, scale=0.4, window=window)
            outputs.append(o[0])
        first += len(paths)
    return torch.stack(outputs)[None]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_node_sees_its_path(dtype: torch.dtype, window: int | None) -> None:
    q, k, v = case(dtype)
    # What nobody sees may be anything finite.
    k[PAGES[0, 3], 1:] = v[PAGES[0, 3], 1:] = 7.0
    o = attention_paged_tree(
        q, k, v, PAGES, ancestors(), lengths=LENGTHS, past=PAST, scale=0.4, window=window
    )
    exact = by_paths(*(x.double() for x in (q, k, v)), window)
    check_error("o", o, by_paths(q, k, v, window), exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ancestors": torch.ones(2, 5, 5, dtype=torch.bool)}, "lengths must lie in 1 to A = 5"),
        ({"ancestors": torch.ones(2, 6, 5, dtype=torch.bool)}, "ancestors must have shape"),
        ({"lengths": [6, 3]}, r"sum to B \* T = 10, got \[6, 3\]"),
        ({"past": [11, 0]}, "pages must have room for 17 keys, got room for 16"),
        ({"past": [-1, 0]}, "past must be 2 numbers >= 0"),
        ({"pages": PAGES[:1]}, r"pages must have shape \[N, M\]"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    q, k, v = case(torch.float32)
    values = {"pages": PAGES, "ancestors": ancestors(), "lengths": LENGTHS, "past": PAST} | change
    with pytest.raises(ValueError, match=message):
        attention_paged_tree(q, k, v, scale=1.0, **values)
