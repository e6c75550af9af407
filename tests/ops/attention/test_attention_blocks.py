"""Blocks of keys, joined by their log-sum-exp, are softmax attention over all of them."""

from collections.abc import Sequence

import pytest
import torch
from test_attention import GROUPS, SCALE, D, dense, random
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops import (
    Block,
    Impl,
    attention_block,
    attention_block_backward,
    join_blocks,
)
from sevenfold.ops.attention import blocks_eager, default_block_impl
from sevenfold.ops.testing import check_error, poisoned_allocations

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def inputs(lengths: Sequence[int], H: int, G: int, dtype: torch.dtype) -> list[Tensor]:
    T = sum(lengths)
    return [random(T, n, D, dtype=dtype, seed=i) for i, n in enumerate((H, G, G))]


def whole(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([dense(*part) for part in parts])


def in_blocks(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], cuts: Sequence[int]):
    """Each sequence's tail after its cut: causal over itself, then over what lies before."""
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    own = torch.cat(
        [torch.arange(s + c, s + n) for s, c, n in zip(starts, cuts, lengths, strict=True)]
    )
    tails = [n - c for c, n in zip(cuts, lengths, strict=True)]
    earlier = torch.cat([torch.arange(s, s + c) for s, c in zip(starts, cuts, strict=True)])
    blocks = [
        Block(tails, tails, SCALE, causal=True),
        Block(tails, list(cuts), SCALE, causal=False),
    ]
    return own, [(own, blocks[0]), (earlier, blocks[1])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "G"), GROUPS)
def test_joined_blocks_and_their_gradients(H: int, G: int, dtype: torch.dtype) -> None:
    lengths, cuts = (5, 9, 2), (2, 8, 1)

    def run(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = inputs(lengths, H, G, dtype)
        own, blocks = in_blocks(q, k, v, lengths, cuts)
        queries, total, lse = q[own], None, None
        for keys, block in blocks:
            o, more = attention_block(queries, k[keys], v[keys], block)
            if total is None:
                total, lse = o.to(more.dtype), more
            else:
                join_blocks(total, lse, o, more)
        o, do = total.to(dtype), random(len(own), H, D, dtype=dtype, seed=9)
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (queries, k, v))
        for keys, block in blocks:
            found = attention_block_backward(do, (queries, k[keys], v[keys]), o, lse, block)
            dq += found[0]
            dk[keys] += found[1]
            dv[keys] += found[2]
        return [o, dq, dk, dv]

    def exact(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in inputs(lengths, H, G, dtype)]
        own, _ = in_blocks(*leaves, lengths, cuts)
        o = whole(*leaves, lengths)[own]
        do = random(len(own), H, D, dtype=dtype, seed=9)
        dq, dk, dv = torch.autograd.grad(o, leaves, do)
        return [o.detach(), dq[own], dk, dv]

    with poisoned_allocations():
        found = run(dtype)
    eager = torch.float32 if dtype is torch.float64 else dtype
    for name, ours, theirs, truth in zip(
        ("o", "dq", "dk", "dv"), found, exact(eager), exact(torch.float64), strict=True
    ):
        check_error(name, ours, theirs, truth)


def test_log_sum_exp_is_that_of_the_visible_scores() -> None:
    q, k, v = inputs((4,), 2, 1, torch.float64)
    _, lse = attention_block(q, k, v, Block([4], [4], SCALE, causal=True))
    scores = SCALE * torch.einsum("ihd,jd->hij", q, k[:, 0])
    hidden = torch.arange(4) > torch.arange(4)[:, None]
    expected = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    check_error("lse", lse, expected.float(), expected)


def test_tiles_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs((7, 6), 4, 2, torch.float64)
    for block in (Block([7, 6], [7, 6], SCALE, True), Block([6, 7], [8, 5], SCALE, False)):
        once = attention_block(q, k, v, block)
        do = torch.ones_like(q)
        back = attention_block_backward(do, (q, k, v), *once, block)
        with monkeypatch.context() as small:
            small.setattr(blocks_eager, "_TILE_ELEMENTS", 50)
            again = attention_block(q, k, v, block)
            for a, b in zip(
                (*once, *back),
                (*again, *attention_block_backward(do, (q, k, v), *again, block)),
                strict=True,
            ):
                check_error("tiles", b, a.float(), a)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block([2, 2], [4], SCALE, False), r"key_lengths must be 2 numbers, got \[4\]"),
        (Block([1, 3], [3, 1], SCALE, True), r"key_lengths must be lengths, got \[3, 1\]"),
        (Block([4, 0], [2, 2], SCALE, False), r"lengths must be >= 1 and sum to 4, got \[4, 0\]"),
        (Block([4], [5], SCALE, False), r"key_lengths must be >= 1 and sum to 4, got \[5\]"),
    ],
)
def test_lengths_that_do_not_fit(block: Block, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_block(*inputs((4,), 2, 2, torch.float32), block)


def test_flash_is_for_a_gpu_and_heads_must_divide() -> None:
    q, k, v = inputs((4,), 3, 2, torch.bfloat16)
    block = Block([4], [4], SCALE, True)
    with pytest.raises(ValueError, match="k's heads must divide the 3 query heads, got 2"):
        attention_block(q, k, v, block)
    with pytest.raises(UnsupportedError, match=r"bf16 or fp16 on a GPU for impl flash, got"):
        attention_block(k, k, v, block, impl="flash")
    assert default_block_impl(torch.device("cuda"), torch.bfloat16) is Impl.FLASH
    assert default_block_impl(torch.device("cuda"), torch.float32) is Impl.EAGER
    assert default_block_impl(torch.device("cpu"), torch.bfloat16) is Impl.EAGER


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "G"), [(8, 8), (8, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_agrees_with_products(H: int, G: int, causal: bool) -> None:
    lengths = [100, 33, 1]
    key_lengths = lengths if causal else [7, 128, 64]
    block = Block(lengths, key_lengths, 64**-0.5, causal)
    shapes = [(sum(lengths), H, 64), *[(sum(key_lengths), G, 64)] * 2, (sum(lengths), H, 64)]
    q, k, v, do = (
        random(*shape, dtype=torch.bfloat16, seed=i).cuda() for i, shape in enumerate(shapes)
    )

    def run(dtype: torch.dtype, impl: str) -> list[Tensor]:
        tokens = [x.to(dtype) for x in (q, k, v)]
        o, lse = attention_block(*tokens, block, impl=impl)
        back = attention_block_backward(do.to(dtype), tokens, o, lse, block, impl=impl)
        return [o, lse, *back]

    results = (
        run(torch.bfloat16, "flash"),
        run(torch.bfloat16, "eager"),
        run(torch.float64, "eager"),
    )
    for name, ours, eager, exact in zip(("o", "lse", "dq", "dk", "dv"), *results, strict=True):
        check_error(name, ours, eager.to(torch.bfloat16), exact)
