"""Sequences in pages that share one pool, and what attention over their keys is."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

NUM_PAGES = 24


@dataclass(frozen=True)
class Case:
    """lengths: new tokens of each sequence; totals: its keys; both on the host.

    tree: new tokens are a tree; else a chain.
    packed: all in one row, with cu_seqlens; else rows of equal length.
    """

    lengths: tuple[int, ...]
    totals: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (16, 16)
    page_tokens: int = 16
    window: int | None = None
    tree: bool = False
    packed: bool = False
    spare_pages: int = 1


@dataclass
class Inputs:
    """Arguments of attention_pages but scale, window and impl."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    pages: Tensor
    key_lengths: Tensor
    cu_seqlens: Tensor | None
    ancestors: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Inputs":
        found = {name: x if x is None else x.to(device) for name, x in vars(self).items()}
        if dtype is not None:
            found |= {name: found[name].to(dtype) for name in ("q", "k_pages", "v_pages")}
        return Inputs(**found)


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random tokens; places of the pool that hold no key are NaN, and pages lie apart."""
    random = torch.Generator().manual_seed(seed)
    (H, G), (D, V), P = case.heads, case.widths, case.page_tokens
    used = [-(-total // P) for total in case.totals]
    pages = torch.randperm(NUM_PAGES, generator=random)[: sum(used)].split(used)
    table = torch.full((len(used), max(used) + case.spare_pages), NUM_PAGES - 1)
    pools = [apart(torch.full((NUM_PAGES, P, G, w), float("nan"), dtype=dtype)) for w in (D, V)]
    for n, (own, total) in enumerate(zip(pages, case.totals, strict=True)):
        table[n, : len(own)] = own
        at = torch.arange(total)
        for pool, width in zip(pools, (D, V), strict=True):
            new = torch.randn(total, G, width, generator=random).to(dtype)
            pool[own[at // P], at % P] = new
    lead = (1, sum(case.lengths)) if case.packed else (len(case.lengths), case.lengths[0])
    q = torch.randn(*lead, H, D, generator=random).to(dtype)
    starts = torch.tensor([0, *case.lengths]).cumsum(0) if case.packed else None
    trees = [tree(case.lengths[0], random) for _ in case.lengths] if case.tree else None
    sees = None if trees is None else torch.stack(trees)
    return Inputs(q, *pools, table, torch.tensor(case.totals), starts, sees)


def with_rows_behind(x: Inputs, rows: int) -> Inputs:
    """The same packed sequences in a row that goes on, with what is no number."""
    return replace(x, q=torch.nn.functional.pad(x.q, (0, 0, 0, 0, 0, rows), value=float("nan")))


def apart(pool: Tensor, gap: int = 32) -> Tensor:
    """The pool with other things between its pages, as an arena holds it."""
    size = pool[0].numel() + gap
    arena = torch.full((len(pool) * size,), 7.0, dtype=pool.dtype)
    return arena.as_strided(pool.shape, (size, *pool.stride()[1:])).copy_(pool)


def tree(T: int, random: torch.Generator) -> Tensor:
    """Who sees whom where each token's parent is a token before it, or what came before all."""
    sees = torch.eye(T, dtype=torch.bool)
    for t in range(1, T):
        parent = int(torch.randint(-1, t, (1,), generator=random))
        if parent >= 0:
            sees[t] |= sees[parent]
    return sees
