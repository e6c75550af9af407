"""The kernels over pages keep to the error rule, on a GPU or under Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from kernel_device import DEVICE, DTYPES, INTERPRETED
from pages_cases import Case, Inputs, apart, make, with_rows_behind
from torch import Tensor

from sevenfold.ops import attention_pages, write_pages
from sevenfold.ops.attention import triton_pages
from sevenfold.ops.testing import check_error, poisoned_allocations

pytestmark = [
    pytest.mark.filterwarnings("ignore:attention_pages has no tuning"),
    # NumPy's, in the interpreter, of rows behind the last: nobody reads them.
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
if not INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

CPU = torch.device("cpu")
DECODE = Case((1,) * 4, (0, 1, 17, 70))
CASES = {
    "decode": DECODE,
    "chain": Case((3, 3), (3, 66)),
    "tree": Case((6, 6), (6, 60), tree=True),
    "window": replace(DECODE, window=9),
    "tree in a window": Case((6, 6), (6, 60), tree=True, window=3),
    "prefill": Case((0, 5, 1, 35), (0, 5, 40, 70), packed=True),
    "prefill in a window": Case((20, 5), (50, 5), packed=True, window=7),
    "keys in one piece": Case((96, 5), (110, 9), packed=True),
    "blocks of several pages": replace(DECODE, page_tokens=8),
    "blocks of several pages, packed": Case((5, 1), (5, 70), page_tokens=8, packed=True),
    "pages of several blocks": Case((5, 35), (5, 70), page_tokens=32, packed=True),
}
if not INTERPRETED:
    CASES |= {
        f"{name} of {D}": replace(case, heads=(16, 2), widths=(D, V), page_tokens=64)
        for name, case in CASES.items()
        if "several" not in name
        for D, V in [(64, 64), (128, 128), (96, 48), (256, 256)]
    }
    CASES |= {
        "one key head": Case((16,) * 3, (16, 900, 1400), (64, 1), (128, 128), 128),
        "a group of three": Case((2,) * 3, (16, 900, 300), heads=(12, 4), page_tokens=64),
        "long": Case((1, 1), (5000, 3), heads=(8, 1), widths=(64, 64), page_tokens=256),
        "chunk": Case((700, 1, 129), (5000, 1, 129), (8, 1), (128, 128), 256, packed=True),
        "end": Case((60, 1), (5000, 300), (16, 4), (128, 128), 256, packed=True),
    }


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of keys and of rows, and several shares, in sequences that are tiny."""
    if not INTERPRETED:
        return
    config = {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(triton_pages, "_config", lambda _call: config)
    monkeypatch.setattr(triton_pages, "LEAST_SPLIT_TOKENS", 16)
    monkeypatch.setattr(triton_pages, "MOST_SPLITS", 4)
    monkeypatch.setattr(triton_pages, "FEW_PACKED_ROWS", 100)


def attend(x: Inputs, case: Case, impl: str) -> Tensor:
    with poisoned_allocations():
        return attention_pages(**vars(x), scale=0.3, window=case.window, impl=impl).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_call_keeps_to_the_error_rule(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    x = make(case, dtype)
    exact = attend(x.to(CPU, torch.float64), case, "reference")
    plain = "reference" if dtype == torch.float32 else "eager"
    honest = attend(x.to(DEVICE), case, plain)
    check_error("o", attend(x.to(DEVICE), case, "triton"), honest, exact)


@pytest.mark.parametrize("name", ["decode", "prefill", *(["long"] * (not INTERPRETED))])
def test_company_and_room_change_no_bit(name: str) -> None:
    case = CASES[name]
    x = make(case, DTYPES[0]).to(DEVICE)
    together = attend(x, case, "triton").flatten(0, 1)
    wider = torch.nn.functional.pad(x.pages, (0, 5), value=0)
    assert torch.equal(together, attend(replace(x, pages=wider), case, "triton").flatten(0, 1))
    first = 0
    for n, length in enumerate(case.lengths):
        rows = slice(first, first + length)
        q = x.q.flatten(0, 1)[rows][None]
        starts = torch.tensor([0, length], device=DEVICE) if case.packed else None
        lengths = x.key_lengths[n : n + 1]
        own = replace(x, q=q, pages=x.pages[n : n + 1], key_lengths=lengths, cu_seqlens=starts)
        assert torch.equal(together[rows], attend(own, case, "triton")[0])
        first += length


@pytest.mark.parametrize("name", ["prefill", "prefill in a window"])
@pytest.mark.parametrize("rows", [1, 50])
def test_rows_behind_the_last_border_change_no_bit(name: str, rows: int) -> None:
    case = CASES[name]
    x = make(case, DTYPES[0]).to(DEVICE)
    found = attend(with_rows_behind(x, rows), case, "triton")
    assert torch.equal(found[:, :-rows], attend(x, case, "triton"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_go_to_their_pages_and_nowhere_else(dtype: torch.dtype) -> None:
    k, v = (torch.randn(5, 3, width).to(dtype).to(DEVICE) for width in (24, 16))
    page, place = torch.tensor([[2, 0, 3, 3, 0], [1, 0, 3, 0, 2]], device=DEVICE)
    pools = [apart(torch.zeros(4, 4, 3, width, dtype=dtype)).to(DEVICE) for width in (24, 16)]
    wanted = [pool.clone() for pool in pools]
    write_pages(k, v, *wanted, page, place, impl="eager")
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    write_pages(*heads_first, *pools, page, place, impl="triton")
    assert torch.equal(pools[0][2, 1], k[0])
    assert all(torch.equal(a, b) for a, b in zip(pools, wanted, strict=True))
