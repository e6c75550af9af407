"""Softmax attention over keys in pages as Triton kernels: decoding, verification and prefill.

A program owns a block of rows, which are new tokens times the query heads of one key head, and a
share of the keys. Its running maximum m, sum l and output acc of base-2 exponentials are

    m' = max(m, s)    l' = 2^(m - m') l + sum 2^(s - m')    acc' = 2^(m - m') acc + 2^(s - m') V

Where few rows would leave a GPU idle, the keys are split; each share gives its output and its
log-sum-exp, and a second kernel weighs them. How keys are split depends on their number alone,
never on the table's width, and whether they are on the new tokens alone: of a sequence in rows of
equal length, of all in a packed row.

Source: FlashAttention-2 (arXiv 2307.08691), Flash-Decoding (2023), PagedAttention (arXiv
2309.06180); the search for a block's sequence is vLLM's, in its unified Triton attention.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.triton_overlap import wait_for_last
from sevenfold.ops.tuning import best_config

WIDEST = 256
MOST_SPLITS = 32
LEAST_SPLIT_TOKENS = 256
_LOG2E = 1.4426950408889634


class Call(NamedTuple):
    """Arguments of the public operator, checked.

    starts: [N + 1] where each sequence's rows of q begin, or None: then each has T of them.
    """

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    pages: Tensor
    key_lengths: Tensor
    starts: Tensor | None
    ancestors: Tensor | None
    scale: float
    window: int | None


@triton.jit
def _sequence_of(starts, block, N, BQ: tl.constexpr):
    """The sequence whose rows a block holds: each begins at block start // BQ + its number."""
    low, high = 0, N
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle).to(tl.int32) // BQ + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _share(first, last, split, BN: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr):
    """The keys of one share: LEAST, or the fewest blocks of BN of which MOST hold all."""
    size = tl.maximum(LEAST, tl.cdiv(tl.cdiv(last - first, MOST), BN) * BN)
    begin = first + split * size
    return begin, tl.minimum(begin + size, last)


@triton.jit
def _sees(
    ancestors, depths, n, t, at, p, base, T, window,
    TREE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """[BM, BN] whether new token t, at place `at` of its sequence, sees the key of number p."""
    if TREE:
        s = p - base
        drafted = (s >= 0) & (s < T)
        pair = (n * T + t[:, None]) * T + s[None, :]
        chosen = tl.load(ancestors + pair, (t < T)[:, None] & drafted[None, :], other=0) != 0
        sees = (s < 0)[None, :] | chosen
        if WINDOW:
            depth = tl.load(depths + n * T + s, drafted, other=0).to(tl.int32)
            place = tl.where(s < 0, p, base + depth)
            sees = sees & (at[:, None] - place[None, :] < window)
    else:
        sees = p[None, :] <= at[:, None]
        if WINDOW:
            sees = sees & (at[:, None] - p[None, :] < window)
    return sees


@triton.jit
def _block(starts, key_lengths, T, N, BQ: tl.constexpr, PACKED: tl.constexpr):
    """Which rows a program owns.

    Sequence, its first row, its new tokens, the first of them here, keys before all of them.
    """
    if PACKED:
        n = _sequence_of(starts, tl.program_id(0), N, BQ)
        start = tl.load(starts + n).to(tl.int32)
        T = tl.load(starts + n + 1).to(tl.int32) - start
        first_t = (tl.program_id(0) - start // BQ - n) * BQ
    else:
        blocks = tl.cdiv(T, BQ)
        n = tl.program_id(0) // blocks
        start = n * T
        first_t = (tl.program_id(0) % blocks) * BQ
    n = n.to(tl.int64)
    return n, start, T, first_t, tl.load(key_lengths + n).to(tl.int32) - T


@triton.jit
def _exact_scores(q_at, k_at, rows, held, scale, D: tl.constexpr, BD: tl.constexpr):
    """scale q^T k in fp32 by sums of 32 products: one sum of all would round at its size."""
    part: tl.constexpr = 32 if BD > 32 else BD
    s = tl.zeros([rows.shape[0], held.shape[0]], tl.float32)
    for first in tl.static_range(0, BD, part):
        i = first + tl.arange(0, part)
        query = tl.load(q_at[:, None] + i[None, :], rows[:, None] & (i < D)[None, :], other=0.0)
        key = tl.load(k_at[None, :] + i[:, None], held[None, :] & (i < D)[:, None], other=0.0)
        s += tl.dot(query, key, input_precision="ieee") * scale
    return s


@triton.jit
def _over_keys(
    query, q_at, rows, k, v, pages, ancestors, depths, n, t, at, base, T, begin, end, scale, window,
    k_page, k_token, v_page, v_token,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TREE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """acc, m and l of the rows over keys `begin` to `end` of their sequence.

    `begin` is a multiple of BN. A page that holds blocks of BN is asked for once a block, and a
    block ahead: whatever reads keys by an address that is just being loaded waits twice.
    """
    IN_PAGE: tl.constexpr = PAGE % BN == 0
    i, iv, ar_n = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BN)
    m, l = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    coming = tl.load(pages + begin // PAGE, begin < end, other=0).to(tl.int64)
    for offset in range(begin, end, BN):
        p = offset + ar_n
        held = p < end
        if IN_PAGE:
            page, place = coming, offset % PAGE + ar_n
            ahead = offset + BN
            coming = tl.load(pages + ahead // PAGE, ahead < end, other=0).to(tl.int64)
        else:
            page, place = tl.load(pages + p // PAGE, held, other=0).to(tl.int64), p % PAGE
        k_at = k + page * k_page + place * k_token
        if query.dtype == tl.float32:
            s = _exact_scores(q_at, k_at, rows, held, scale, D, BD)
        else:
            key = tl.load(k_at[None, :] + i[:, None], held[None, :] & (i < D)[:, None], other=0.0)
            s = tl.dot(query, key) * scale
        sees = _sees(ancestors, depths, n, t, at, p, base, T, window, TREE, WINDOW)
        s = tl.where(sees & held[None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(top == float("-inf"), 0.0, top)
        weight, kept = tl.exp2(s - finite[:, None]), tl.exp2(m - finite)
        l = l * kept + tl.sum(weight, 1)
        v_at = v + page * v_page + place * v_token
        value = tl.load(v_at[:, None] + iv[None, :], held[:, None] & (iv < V)[None, :], other=0.0)
        if query.dtype == tl.float32:
            added = tl.dot(weight, value, input_precision="ieee")
            acc = tl.fma(acc, tl.zeros_like(acc) + kept[:, None], added)
        else:
            acc = tl.dot(weight.to(value.dtype), value, acc * kept[:, None])
        m = top
    return acc, m, l


# Numbers of a step and not of a model: as compiled for one, it serves any.
@triton.jit(do_not_specialize=["pages_row", "T", "N", "rows"])
def _attend_kernel(
    q, k, v, pages, key_lengths, starts, ancestors, depths, o, lse, scale, window,
    q_token, q_head, k_page, k_token, k_head, v_page, v_token, v_head, pages_row,
    T, N, H, rows,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PAGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MOST: tl.constexpr,
    LEAST: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr, TREE: tl.constexpr,
    WINDOW: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A program owns BM rows of one key head, and one share of their keys where SPLIT."""
    wait_for_last(OVERLAPS)
    BQ: tl.constexpr = BM // GROUP
    g, r = tl.program_id(1), tl.arange(0, BM)
    n, start, T, first_t, base = _block(starts, key_lengths, T, N, BQ, PACKED)
    if first_t >= T:
        return
    t, h = first_t + r // GROUP, g * GROUP + r % GROUP
    inside = (r < BQ * GROUP) & (t < T)
    at, nearest, end = base + t, base + first_t, base + tl.minimum(T, first_t + BQ)
    if TREE:
        at = base + tl.load(depths + n * T + t, inside, other=0).to(tl.int32)
        nearest, end = base, base + T
    begin = 0
    if WINDOW:
        begin = tl.maximum(nearest - window + 1, 0) // BN * BN
    if SPLIT:
        begin, end = _share(begin, end, tl.program_id(2), BN, MOST, LEAST)
    i, iv, row = tl.arange(0, BD), tl.arange(0, BV), (start + t).to(tl.int64)
    q_at = q + row * q_token + h * q_head
    query = tl.load(q_at[:, None] + i[None, :], inside[:, None] & (i < D)[None, :], other=0.0)
    acc, m, l = _over_keys(
        query, q_at, inside, k + g * k_head, v + g * v_head, pages + n * pages_row, ancestors,
        depths, n, t, at, base, T, begin, end, scale, window, k_page, k_token, v_page, v_token,
        D, V, BD, BV, PAGE, BM, BN, TREE, WINDOW,
    )  # fmt: skip
    some = tl.where(l > 0, l, 1.0)
    out_row = row * H + h
    if SPLIT:
        out_row += tl.program_id(2).to(tl.int64) * rows * H
        tl.store(lse + out_row, tl.where(l > 0, m + tl.log2(some), float("-inf")), inside)
    out_at = o + out_row[:, None] * V + iv[None, :]
    out = (acc / some[:, None]).to(o.dtype.element_ty)
    tl.store(out_at, out, inside[:, None] & (iv < V)[None, :])


@triton.jit(do_not_specialize=["row_heads", "splits"])
def _combine_kernel(
    parts, lse, o, row_heads, splits,
    V: tl.constexpr, BV: tl.constexpr, MOST: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One row and head: shares in one order, MOST of them however many there are."""
    wait_for_last(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    share, iv = tl.arange(0, MOST), tl.arange(0, BV)
    at = share.to(tl.int64) * row_heads + row
    logs = tl.load(lse + at, share < splits, other=float("-inf"))
    top = tl.max(logs, 0)
    weight = tl.exp2(logs - tl.where(top == float("-inf"), 0.0, top))
    inside = (weight > 0)[:, None] & (iv < V)[None, :]
    part = tl.load(parts + at[:, None] * V + iv[None, :], inside, other=0.0)
    total = tl.sum(weight, 0)
    out = tl.sum(weight[:, None] * part, 0) / tl.where(total > 0, total, 1.0)
    tl.store(o + row * V + iv, out.to(o.dtype.element_ty), iv < V)


def attend(call: Call) -> Tensor:
    """Run a checked call; the result is the public operator's."""
    _check_runnable(call)
    q, H, V = call.q, call.q.shape[2], call.v_pages.shape[-1]
    rows = q.shape[0] * q.shape[1]
    o = q.new_empty(*q.shape[:3], V)
    if o.numel() == 0:
        return o
    config, splits = _config(call), num_splits(call)
    if splits == 1:
        _launch(call, config, o, call.key_lengths, splits)
        return o
    parts = q.new_empty(splits, rows, H, V, dtype=torch.float32)
    lse = q.new_empty(splits, rows, H, dtype=torch.float32)
    _launch(call, config, parts, lse, splits)
    _combine_kernel[(rows * H,)](
        parts, lse, o, rows * H, splits,
        V=V, BV=next_power_of_2(V), MOST=MOST_SPLITS, num_warps=2, **overlapping(o),
    )  # fmt: skip
    return o


def num_splits(call: Call) -> int:
    """Shares that the longest sequence of a table can have; 1 where rows are many."""
    if call.q.shape[1] > (FEW_ROWS if call.starts is None else FEW_PACKED_ROWS):
        return 1
    most = call.pages.shape[1] * call.k_pages.shape[1]
    return max(1, min(MOST_SPLITS, -(-most // LEAST_SPLIT_TOKENS)))


FEW_ROWS = 16  # new tokens of a sequence up to which its keys are split
FEW_PACKED_ROWS = 512  # and of a packed row, in all: the end of a prompt behind a long prefix


def _launch(call: Call, config: dict[str, int], o: Tensor, lse: Tensor, splits: int) -> None:
    q, k, v = (_even(x) for x in (call.q, call.k_pages, call.v_pages))
    (B, T, H, D), (_, page_tokens, G, V) = q.shape, v.shape
    BM, N = _block_rows(call, config), len(call.pages)
    BQ = BM // (H // G)
    blocks = B * cdiv(T, BQ) if call.starts is None else T // BQ + N
    sees = call.ancestors
    depths = call.key_lengths if sees is None else sees.sum(-1, dtype=torch.int32) - 1
    q_rows = q.flatten(0, 1)
    _attend_kernel[(blocks, G, splits)](
        q_rows, k, v, call.pages, call.key_lengths,
        call.key_lengths if call.starts is None else call.starts,
        call.key_lengths if sees is None else sees.contiguous(), depths, o, lse,
        float(call.scale) * _LOG2E, 0 if call.window is None else call.window,
        *q_rows.stride()[:2], *k.stride()[:3], *v.stride()[:3], call.pages.stride(0),
        T, N, H, B * T,
        GROUP=H // G, D=D, V=V, BD=max(16, next_power_of_2(D)),
        BV=max(16, next_power_of_2(V)), PAGE=page_tokens, BM=BM, BN=config["BN"],
        MOST=MOST_SPLITS, LEAST=LEAST_SPLIT_TOKENS, SPLIT=splits > 1,
        PACKED=call.starts is not None, TREE=sees is not None, WINDOW=call.window is not None,
        num_warps=config["num_warps"], num_stages=config["num_stages"], **overlapping(o),
    )  # fmt: skip


def _block_rows(call: Call, config: dict[str, int]) -> int:
    """Rows of a program: the configuration's, or fewer where a sequence has fewer."""
    group = call.q.shape[2] // call.k_pages.shape[2]
    least = max(16, next_power_of_2(group))
    if call.starts is not None:
        return max(least, config["BM"])
    return max(least, min(config["BM"], next_power_of_2(call.q.shape[1] * group)))


def _config(call: Call) -> dict[str, int]:
    q, width = call.q, max(call.q.shape[-1], call.v_pages.shape[-1])
    few = call.starts is None and q.shape[1] <= FEW_ROWS
    size = max(16, next_power_of_2(width))
    name = torch.cuda.get_device_name(q.device) if q.is_cuda else "default"
    key = f"D{size} {8 * q.itemsize} bits {'few' if few else 'many'} rows"
    return best_config("attention_pages", key, name)


def _even(x: Tensor) -> Tensor:
    """x with its last axis laid out without gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_runnable(call: Call) -> None:
    q, width = call.q, max(call.q.shape[-1], call.v_pages.shape[-1])
    if q.device.type != "cuda" and isinstance(_attend_kernel, triton.JITFunction):
        raise UnsupportedError(f"impl 'triton' must run on a CUDA device, got {q.device}")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UnsupportedError(f"impl 'triton' must run in bf16, fp16 or fp32, got {q.dtype}")
    if width > WIDEST:
        raise UnsupportedError(f"impl 'triton' must have heads of at most {WIDEST}, got {width}")
