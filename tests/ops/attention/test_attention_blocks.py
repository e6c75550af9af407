"""Blocks of keys, joined by their log-sum-exp, are softmax attention over all of them."""

from collections.abc import Sequence

import pytest
import torch
from test_attention import GROUPS, SCALE, D, dense, random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sevenfold.config import UnsupportedError
from sevenfold.ops import (
    Block,
    Impl,
    KeptResult,
    attention,
    attention_block,
    attention_block_backward,
    attention_kept,
    join_blocks,
    suits_keeping,
)
from sevenfold.ops.attention import blocks_cudnn, blocks_eager, cudnn, kept
from sevenfold.ops.attention import default_block_impl as default_impl
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


def test_cudnn_takes_equal_sequences_of_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "refusal", lambda *_: None)
    with FakeTensorMode():
        q = torch.empty(4, 2, 8, dtype=torch.bfloat16, device="cuda")
        few, many = (Block([n], [3 * n], SCALE, causal=False) for n in (1024, 1000))
        unequal = Block([1024, 2048], [1024, 2048], SCALE, causal=True)
        assert [default_impl(q, q, x) for x in (few, many, unequal)] == [
            Impl.CUDNN,
            Impl.FLASH,
            Impl.FLASH,
        ]
        assert default_impl(q.float(), q.float(), few) is Impl.EAGER
    assert default_impl(torch.empty(4, 2, 8).bfloat16(), q, few) is Impl.EAGER
    taken = [n for n in range(512, 40_000, 512) if blocks_cudnn.refusal(q, q, _alone(n)) is None]
    assert taken == [*range(1024, 16 * 1024, 1024), *range(16 * 1024, 32 * 1024, 2048), 32 * 1024,
                     36 * 1024]  # fmt: skip
    assert "must be at most 536870912" in str(blocks_cudnn.refusal(q, q, _alone(2**26)))
    torch.use_deterministic_algorithms(True)
    try:
        refusal = blocks_cudnn.refusal(q, q, _alone(1024))
    finally:
        torch.use_deterministic_algorithms(False)
    assert "under torch.use_deterministic_algorithms(True)" in str(refusal)
    with pytest.raises(UnsupportedError, match=r"lengths must all be one product of 1024, a power"):
        attention_block(*inputs((4,), 2, 2, torch.bfloat16), _alone(4), impl="cudnn")


def _alone(length: int) -> Block:
    return Block([length], [length], SCALE, causal=True)


@pytest.mark.parametrize(("lengths", "most"), [((6,), None), ((3, 3), None), ((2, 2, 2), 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_equal_sequences_go_to_cudnn_at_once(
    lengths: tuple[int, ...], most: int | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain products of each sequence stand in for the library, in its layout.

    One by one where they are too much for one call.
    """

    def each(function, do, tokens, more, scale):
        sizes = [[x.shape[2]] for x in tokens[:2]]
        block = Block(*sizes, scale, causal)
        found = []
        for n in range(len(tokens[0])):
            own = [x[n].transpose(0, 1) for x in tokens]
            rows = [] if do is None else [do[n].transpose(0, 1)]
            rest = [] if do is None else [own, more[0][n].transpose(0, 1), more[1][n]]
            found.append(function(*(rows + rest if rows else own), block))
        return [torch.stack(x) for x in zip(*found, strict=True)]

    calls = []

    def attend(tokens, *, scale, causal):
        calls.append(len(tokens[0]))
        o, lse = each(blocks_eager.forward, None, tokens, (), scale)
        return o.transpose(1, 2), lse

    def gradients(do, tokens, o, lse, *, scale, causal):
        found = each(blocks_eager.backward, do, tokens, (o, lse), scale)
        return [x.transpose(1, 2) for x in found]

    for name, function in (("attend", attend), ("gradients", gradients)):
        monkeypatch.setattr(cudnn, name, function)
    if most is not None:
        monkeypatch.setattr(blocks_cudnn, "_MOST_ELEMENTS", most)
    keys = lengths if causal else [2 * n for n in lengths]
    block = Block(lengths, keys, SCALE, causal)
    q, do = (random(6, 4, D, dtype=torch.float64, seed=n) for n in range(2))
    k, v = (random(sum(keys), 2, D, dtype=torch.float64, seed=n) for n in (2, 3))
    found, expected = [], []
    for results, module in ((found, blocks_cudnn), (expected, blocks_eager)):
        o, lse = module.forward(q, k, v, block)
        results += [o, lse, *module.backward(do, (q, k, v), o, lse, block)]
    for name, ours, exact in zip(("o", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        check_error(name, ours, exact.float(), exact)
    assert calls == ([len(lengths)] if most is None else [1] * len(lengths))


def test_the_librarys_operators_take_what_they_are_given() -> None:
    with torch.device("meta"):
        q, k = (torch.empty(2048, heads, 128, dtype=torch.bfloat16) for heads in (16, 4))
    block = Block([1024] * 2, [1024] * 2, SCALE, causal=True)
    o, lse = blocks_cudnn.forward(q, k, k, block)
    assert (o.shape, lse.shape, lse.dtype) == (q.shape, (16, 2048), torch.float32)
    found = blocks_cudnn.backward(o, (q, k, k), o, lse, block)
    assert [x.shape for x in found] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize(("H", "G"), GROUPS)
def test_attention_is_kept_for_a_second_run(
    H: int, G: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [5, 9, 2]
    leaves = [x[None].requires_grad_() for x in inputs(lengths, H, G, torch.float64)]
    how = {"lengths": lengths, "scale": SCALE}
    expected = attention(*leaves, **how)
    assert torch.autograd.gradcheck(
        lambda *t: attention_kept(*t, **how, kept=KeptResult()), leaves, fast_mode=True
    )
    result = KeptResult()
    first = attention_kept(*leaves, **how, kept=result)
    monkeypatch.setattr(kept, "attention_block", None)  # nothing is computed again
    second = attention_kept(*leaves, **how, kept=result)
    check_error("o", first.detach(), expected.detach().float(), expected.detach())
    assert torch.equal(first, second)
    do = torch.ones_like(first)
    grads = [torch.autograd.grad(o, leaves, do) for o in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert not suits_keeping(leaves[0], leaves[2], lengths)  # fp64 on a CPU


@pytest.mark.gpu
def test_more_than_one_call_takes_goes_sequence_by_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.get_device_capability() != cudnn.CAPABILITY:
        pytest.skip("the kernel is for compute capability 9.0")
    block = Block([1024] * 3, [2048] * 3, 64**-0.5, causal=False)
    shapes = [(3072, 4, 64), (6144, 2, 64), (6144, 2, 64), (3072, 4, 64)]
    q, k, v, do = (
        random(*shape, dtype=torch.bfloat16, seed=i).cuda() for i, shape in enumerate(shapes)
    )

    def run() -> list[Tensor]:
        o, lse = blocks_cudnn.forward(q, k, v, block)
        return [o, lse, *blocks_cudnn.backward(do, (q, k, v), o, lse, block)]

    together = run()
    monkeypatch.setattr(blocks_cudnn, "_MOST_ELEMENTS", 2048 * 4 * 64)
    for a, b in zip(together, run(), strict=True):
        check_error("apart", b, a, a.double())


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "G"), [(8, 8), (8, 2)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("impl", ["flash", "cudnn"])
def test_libraries_agree_with_products(H: int, G: int, causal: bool, impl: str) -> None:
    lengths, key_lengths = ([100, 33, 1], [7, 128, 64])
    if impl == "cudnn":
        if torch.cuda.get_device_capability() != cudnn.CAPABILITY:
            pytest.skip("the kernel is for compute capability 9.0")
        lengths, key_lengths = [1024, 1024], [3072, 3072]
    key_lengths = lengths if causal else key_lengths
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
        run(torch.bfloat16, impl),
        run(torch.bfloat16, "eager"),
        run(torch.float64, "eager"),
    )
    for name, ours, eager, exact in zip(("o", "lse", "dq", "dk", "dv"), *results, strict=True):
        check_error(name, ours, eager.to(torch.bfloat16), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_cudnn_join_like_those_of_products(causal: bool) -> None:
    """The backward of one block takes o and lse of all of a query's keys."""
    if torch.cuda.get_device_capability() != cudnn.CAPABILITY:
        pytest.skip("the kernel is for compute capability 9.0")
    tokens = [
        random(n, h, 128, dtype=torch.bfloat16, seed=h + n) for n, h in ((1024, 8), (3072, 2))
    ]
    q, k, v, do = (x.cuda() for x in (*tokens, tokens[1] + 1, tokens[0] - 1))
    blocks = [
        (slice(2048, 3072), Block([1024], [1024], 128**-0.5, causal=causal)),
        (slice(0, 2048), Block([1024], [2048], 128**-0.5, causal=False)),
    ]

    def run(dtype: torch.dtype, impl: str) -> list[Tensor]:
        x, y, z, g = (t.to(dtype) for t in (q, k, v, do))
        parts = [attention_block(x, y[at], z[at], b, impl=impl) for at, b in blocks]
        (o, lse), more = (parts[0][0].to(parts[0][1].dtype), parts[0][1]), parts[1]
        join_blocks(o, lse, *more)
        o, found = o.to(dtype), []
        for at, b in blocks:
            found += attention_block_backward(g, (x, y[at], z[at]), o, lse, b, impl=impl)
        return [o, lse, *found]

    found = (
        run(torch.bfloat16, "cudnn"),
        run(torch.bfloat16, "eager"),
        run(torch.float64, "eager"),
    )
    for n, (ours, eager, exact) in enumerate(zip(*found, strict=True)):
        check_error(str(n), ours, eager.to(torch.bfloat16), exact)
