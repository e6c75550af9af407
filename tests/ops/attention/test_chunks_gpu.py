"""Chunks of prompts by cuDNN on a GPU: the error rule, no waiting, and the cuts of long ones."""

import pytest
import torch
from pages_cases import apart
from torch import Tensor

from sevenfold.ops import attention_chunks, attention_pages, suits_chunks
from sevenfold.ops.attention import chunks_cudnn, cudnn
from sevenfold.ops.attention.block import Block
from sevenfold.ops.attention.blocks_eager import forward as by_products
from sevenfold.ops.attention.chunks_plan import Cut
from sevenfold.ops.testing import check_error, poisoned_allocations

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:attention_pages has no tuning")]
PAGE_TOKENS = 64
# (past, new) of each sequence, and what of it a case is for.
CASES = {
    "one block": [(0, 1024)],
    "powers of two": [(0, 2048)],
    "rows twice": [(0, 1025)],
    "odd": [(777, 5001)],
    "one before": [(1, 1100)],
    "a page less one": [(63, 1024)],
    "several": [(0, 1500), (100, 37), (2048, 1024), (0, 0), (5, 1)],
}
DTYPES = [torch.bfloat16, torch.float16]


def inputs(case: list[tuple[int, int]], dtype: torch.dtype, D: int = 128, heads=(4, 1)):
    """q, k_pages, v_pages, pages; places that hold no key are NaN, and pages lie apart."""
    random = torch.Generator().manual_seed(sum(map(sum, case)))
    used = [-(-(past + new) // PAGE_TOKENS) for past, new in case]
    order = torch.randperm(sum(used) + 3, generator=random)
    pages = torch.full((len(case), max(used) + 2), int(order[-1]))
    shape = (len(order), PAGE_TOKENS, heads[1], D)
    pools = [apart(torch.full(shape, float("nan"), dtype=dtype)) for _ in range(2)]
    for n, own in enumerate(order[: sum(used)].split(used)):
        pages[n, : len(own)] = own
        at = torch.arange(sum(case[n]))
        for pool in pools:
            new = torch.randn(len(at), *shape[2:], generator=random).to(dtype)
            pool[own[at // PAGE_TOKENS], at % PAGE_TOKENS] = new
    q = torch.randn(1, sum(new for _, new in case), heads[0], D, generator=random).to(dtype)
    return [x.cuda() for x in (q, *pools, pages)]


def attend(x: list[Tensor], case: list[tuple[int, int]], impl: str) -> Tensor:
    past, lengths = zip(*case, strict=True)
    with poisoned_allocations():
        return attention_chunks(*x, lengths=lengths, past=past, scale=0.1, impl=impl)


def check(x: list[Tensor], case: list[tuple[int, int]]) -> None:
    exact = attend([*(y.double() for y in x[:3]), x[3]], case, "eager")
    check_error("o", attend(x, case, "cudnn"), attend(x, case, "eager"), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_it_keeps_to_the_error_rule(name: str, dtype: torch.dtype) -> None:
    x = inputs(CASES[name], dtype)
    check(x, CASES[name])


def test_it_is_the_default_for_long_chunks_among_many_keys() -> None:
    x = inputs([(0, 1024)], torch.bfloat16)
    for past, new, suits in [
        (0, 8192, True),
        (7168, 1024, True),
        (0, 8191, False),
        (9000, 9, False),
    ]:
        assert suits_chunks(x[0], x[2], [new], [past]) is suits


@pytest.mark.parametrize(("D", "heads"), [(64, (8, 2)), (96, (3, 3)), (128, (16, 2))])
def test_widths_and_groups(D: int, heads: tuple[int, int]) -> None:
    case = [(700, 1200)]
    check(inputs(case, torch.bfloat16, D, heads), case)


def test_a_past_longer_than_what_lies_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_cudnn, "CUT", Cut(unit_tokens=1024, most_tokens=2048))
    case = [(5000, 3100)]
    check(inputs(case, torch.bfloat16), case)


def test_it_gives_what_the_kernel_over_pages_gives() -> None:
    case = CASES["several"]
    q, k_pages, v_pages, pages = x = inputs(case, torch.bfloat16)
    totals = torch.tensor([sum(one) for one in case], device="cuda")
    starts = torch.tensor([0, *(new for _, new in case)], device="cuda").cumsum(0)
    how = {"scale": 0.1, "cu_seqlens": starts, "impl": "triton"}
    kernel = attention_pages(q, k_pages, v_pages, pages, totals, **how)
    exact = attend([*(y.double() for y in x[:3]), pages], case, "eager")
    check_error("o", attend(x, case, "cudnn"), kernel, exact)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_never_waits() -> None:
    case = CASES["several"]
    x = inputs(case, torch.bfloat16)
    attend(x, case, "cudnn")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        past, lengths = zip(*case, strict=True)
        attention_chunks(*x, lengths=lengths, past=past, scale=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("T", "S", "causal"), [(1024, 1024, True), (1024, 2048, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_sum_exp_is_natural(T: int, S: int, causal: bool, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(T + S)
    shapes = [(T, 4, 128), (S, 2, 128), (S, 2, 128)]
    q, k, v = (torch.randn(*shape, generator=random).to(dtype).cuda() for shape in shapes)
    block = Block([T], [S], 0.1, causal)
    found = cudnn.with_lse(q, k, v, scale=0.1, causal=causal)
    honest = by_products(q, k, v, block)
    exact = by_products(q.double(), k.double(), v.double(), block)
    assert found[1].dtype == torch.float32
    for name, ours, eager, truth in zip(("o", "lse"), found, honest, exact, strict=True):
        check_error(name, ours, eager.to(dtype), truth)
