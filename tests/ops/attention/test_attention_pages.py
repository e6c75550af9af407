"""Attention over pages: a dense statement, the reference and eager agree; the rules' messages."""

import re
from dataclasses import replace

import pytest
import torch
from pages_cases import Case, Inputs, apart, make, with_rows_behind
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops import attention_paged, attention_pages, write_pages
from sevenfold.ops.testing import check_error

CASES = {
    "decode": Case((1,) * 4, (0, 1, 17, 33), heads=(6, 2), widths=(5, 3), page_tokens=4),
    "chain": Case((3, 3), (3, 20)),
    "tree": Case((6, 6), (6, 20), tree=True),
    "tree in a window": Case((6, 6), (6, 20), tree=True, window=3),
    "prefill": Case((0, 5, 1, 20), (0, 5, 9, 30), packed=True),
    "prefill in a window": Case((20, 5), (50, 5), packed=True, window=7),
}
META = torch.device("meta")


def dense(x: Inputs, case: Case) -> Tensor:
    """softmax(scale q k + mask) v, each token over all keys of its sequence."""
    rows, outputs = x.q.flatten(0, 1).split(list(case.lengths)), []
    for n, (q, total) in enumerate(zip(rows, case.totals, strict=True)):
        if not total:
            outputs.append(q.new_zeros(len(q), case.heads[0], case.widths[1]))
            continue
        T, group = len(q), case.heads[0] // case.heads[1]
        at = torch.arange(total)
        where = (x.pages[n][at // case.page_tokens], at % case.page_tokens)
        k, v = (y[where].repeat_interleave(group, 1) for y in (x.k_pages, x.v_pages))
        chain = torch.ones(T, T, dtype=torch.bool).tril()
        among = chain if x.ancestors is None else x.ancestors[n]
        place = torch.cat([at[: total - T], total - T + among.sum(-1) - 1])
        age = place[total - T :, None] - place
        sees = torch.cat([torch.ones(T, total - T, dtype=torch.bool), among], 1)
        if case.window is not None:
            sees = sees & (age < case.window)
        scores = 0.3 * torch.einsum("thd,jhd->htj", q, k)
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("htj,jhv->thv", weights, v))
    return torch.cat(outputs).view(*x.q.shape[:3], -1)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_formula(name: str, dtype: torch.dtype, impl: str) -> None:
    case = CASES[name]
    x = make(case, dtype)
    exact = dense(x.to(torch.device("cpu"), torch.float64), case)
    honest = dense(x.to(torch.device("cpu"), torch.promote_types(dtype, torch.float32)), case)
    found = attention_pages(**vars(x), scale=0.3, window=case.window, impl=impl)
    assert found.dtype == dtype
    check_error("o", found, honest.to(dtype), exact)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("name", ["prefill", "prefill in a window"])
def test_rows_behind_the_last_border_change_no_bit(name: str, impl: str) -> None:
    case = CASES[name]
    x = make(case, torch.float32)
    options = {"scale": 0.3, "window": case.window, "impl": impl}
    found = attention_pages(**vars(with_rows_behind(x, 7)), **options)
    assert torch.equal(found[:, :-7], attention_pages(**vars(x), **options))


@pytest.mark.parametrize("name", ["chain", "tree", "prefill"])
def test_opcheck(name: str) -> None:
    x = make(CASES[name], torch.float32)
    arguments = (*vars(x).values(), 0.3, None, "eager")
    torch.library.opcheck(torch.ops.sevenfold.attention_pages.default, arguments)


def test_opcheck_of_writing() -> None:
    pools = [apart(torch.zeros(4, 4, 3, width)) for width in (5, 6)]
    k, v = torch.randn(2, 3, 5), torch.randn(2, 3, 6)
    where = (torch.tensor([1, 3]), torch.tensor([0, 2]))
    torch.library.opcheck(torch.ops.sevenfold.write_pages.default, (k, v, *pools, *where, "eager"))
    write_pages(k, v, *pools, *where)
    assert torch.equal(pools[0][1, 0], k[0])
    assert torch.equal(pools[1][3, 2], v[1])
    assert all(int((pool != 0).flatten(2).any(-1).sum()) == 2 for pool in pools)


WRONG = [
    ({"q": torch.zeros(2, 4, 16)}, ValueError, "q must have 4 dimensions, got 3"),
    ({"k_pages": torch.zeros(4, 2, 16)}, ValueError, "k_pages must have 4 dimensions, got 3"),
    ({"k_pages": torch.zeros(24, 16, 3, 16)}, ValueError, "v_pages must have shape [P, page_tok"),
    ({"v_pages": torch.zeros(24, 16, 2, 16).half()}, TypeError, "v_pages must be torch.float32"),
    ({"v_pages": torch.zeros(24, 16, 2, 16, device=META)}, ValueError, "v_pages must lie on cpu"),
    ({"pages": torch.zeros(3, 2).long()}, ValueError, "pages must have shape [N, M] = [2, 2]"),
    ({"pages": torch.zeros(2, 2)}, TypeError, "pages must be torch.int32 or torch.int64"),
    ({"key_lengths": torch.zeros(3).long()}, ValueError, "key_lengths must have shape [N] = [2]"),
    ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    ({"cu_seqlens": torch.zeros(3).long()}, ValueError, "cu_seqlens needs a packed batch"),
    ({"ancestors": torch.zeros(2, 3, 3)}, TypeError, "ancestors must be torch.bool"),
    ({"ancestors": torch.zeros(2, 3).bool()}, ValueError, "ancestors must have shape [N, T, T]"),
    ({"impl": "onednn"}, UnsupportedError, "attention_pages must use impl reference, eager, trit"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_arguments(changes: dict, error: type[Exception], message: str) -> None:
    arguments = vars(make(CASES["chain"], torch.float32)) | {"scale": 1.0} | changes
    with pytest.raises(error, match=re.escape(message)):
        attention_pages(**arguments)


def test_wrong_trees_and_heads() -> None:
    packed = make(CASES["prefill"], torch.float32)
    sees = torch.ones(1, 26, 26).bool()
    with pytest.raises(ValueError, match="ancestors must be of rows of equal length"):
        attention_pages(**vars(replace(packed, ancestors=sees)), scale=1.0)
    long = make(Case((17,), (17,), tree=True), torch.float32)
    with pytest.raises(ValueError, match="T must be at most 16 with ancestors, got 17"):
        attention_pages(**vars(long), scale=1.0)
    odd = make(CASES["chain"], torch.float32)
    with pytest.raises(ValueError, match="k_pages' heads must divide the 5 query heads, got 2"):
        attention_pages(**vars(replace(odd, q=torch.zeros(2, 3, 5, 16))), scale=1.0)


def test_wrong_writes() -> None:
    pools, where = [torch.zeros(4, 4, 3, 5)] * 2, [torch.zeros(2).long()] * 2
    k = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=re.escape("k must have shape [tokens, G, D], got [2, 5]")):
        write_pages(torch.zeros(2, 5), k, *pools, *where)
    with pytest.raises(ValueError, match=re.escape("v must have shape [tokens, G, V] = [2, 3, 4]")):
        write_pages(k, torch.zeros(3, 3, 4), *pools, *where)
    with pytest.raises(TypeError, match=re.escape("v_pages must be torch.float32, got torch.fl")):
        write_pages(k, k, pools[0], pools[1].double(), *where)
    with pytest.raises(ValueError, match="k_pages must be contiguous within a page, got strides"):
        write_pages(k, k, pools[0].transpose(1, 2).contiguous().transpose(1, 2), pools[1], *where)
    with pytest.raises(
        ValueError, match=re.escape("place must have shape [tokens] = [2], got [3]")
    ):
        write_pages(k, k, *pools, where[0], torch.zeros(3).long())


def test_the_kernels_need_a_gpu() -> None:
    pytest.importorskip("triton")
    x = make(CASES["chain"], torch.float32)
    message = "impl 'triton' must run on a CUDA device, got cpu"
    with pytest.raises(UnsupportedError, match=message):
        attention_pages(**vars(x), scale=1.0, impl="triton")
    pools, where = [torch.zeros(4, 4, 3, 5)] * 2, [torch.zeros(2).long()] * 2
    with pytest.raises(UnsupportedError, match=message):
        write_pages(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), *pools, *where, impl="triton")


def test_a_nan_behind_a_shorter_sequence_reaches_nobody() -> None:
    """Places that a sequence does not fill may hold anything: another's, or what no number is."""
    generator = torch.Generator().manual_seed(0)
    k_pages, v_pages = (torch.randn(4, 16, 1, 8, generator=generator) for _ in range(2))
    q = torch.randn(2, 1, 2, 8, generator=generator)
    pages = torch.tensor([[1, 2], [3, 0]])
    how = {"lengths": (1, 1), "key_lengths": (20, 5), "scale": 1.0}
    wanted = attention_paged(q, k_pages, v_pages, pages, **how)
    for pool in (k_pages, v_pages):
        pool[0], pool[3, 5:] = float("nan"), float("nan")
    assert torch.equal(attention_paged(q, k_pages, v_pages, pages, **how), wanted)
