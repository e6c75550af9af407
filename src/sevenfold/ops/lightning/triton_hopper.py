"""Lightning attention as one persistent, warp-specialised Gluon kernel for Hopper GPUs.

The mathematics is triton_scan's, transposed, so that the state is never moved: a matrix unit reads
its first operand from registers, and there the state stays, V x K in fp32. Narrower heads are
filled up to BV x BK, which the copies do at no cost of bandwidth.

    P = (Q K^T) * M
    O^T = (S^T Q^T) diag(a) + V^T P^T
    S^T = decay^r S^T + (V^T diag(b)) K

One warp loads chunks by bulk tensor copies as far ahead as shared memory reaches, also those of the
next segment; V / 16 warps compute. A program takes segments in turn, of equal length the next
free one, else those that segments.deal_out gave it.

The three kernels of a split overlap (programmatic dependent launch): each starts while the one
before it ends, and waits where it needs a state that is not its own.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sevenfold.ops.lightning.triton_hopper_chunk import (
    aged_values,
    ages_of,
    entered_of,
    first_state,
    keep,
    store_output,
    values_of,
    within_of,
)
from sevenfold.ops.lightning.triton_hopper_load import load_all, next_stop, place, turns, work_at
from sevenfold.ops.lightning.triton_hopper_wide import compute_wide, weight_buffers
from sevenfold.ops.lightning.triton_scan import decayed, forgotten, rate
from sevenfold.ops.triton_launched import launched


@gluon.jit
def _add_piece(S, buffers, bars, at, chunks, log2_decay, gain, A_layout: gl.constexpr,
               C: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The state after a piece, whose output nobody asks for; its chunks are whole."""
    _, k_buf, v_buf = buffers
    ready, empty = bars
    dtype: gl.constexpr = k_buf.dtype
    ages = ages_of(log2_decay, C, gain, A_layout, C, REVERSE)
    decay = decayed(log2_decay * C)
    if chunks > 0:
        vs = aged_values(v_buf, ready, at, ages, dtype, STAGES)
        for chunk in range(chunks):
            S = warpgroup_mma(vs, k_buf.index(at % STAGES), S * decay, is_async=True)
            coming = vs
            if chunk + 1 < chunks:
                coming = aged_values(v_buf, ready, at + 1, ages, dtype, STAGES)
            # The product reads vs from registers until it is waited for.
            S, vs = warpgroup_mma_wait(0, deps=(S, vs))
            vs = coming
            gl.thread_barrier()
            mbarrier.arrive(empty.index(at % STAGES), count=1)
            at += 1
    return S, at


@gluon.jit
def _scan_chunk(S, buffers, p_buf, bars, at, within, entered, ages, decay, STAGES: gl.constexpr):
    """O^T of a chunk, and the state after it, which the matrix unit may still be adding to."""
    q_buf, k_buf, v_buf = buffers
    ready, _ = bars
    dtype: gl.constexpr = k_buf.dtype
    O_layout: gl.constexpr = entered.type.layout.parent
    O_operand: gl.constexpr = gl.DotOperandLayout(0, O_layout, 2)
    P_layout: gl.constexpr = within.type.layout
    V_operand: gl.constexpr = ages.type.layout.parent
    C: gl.constexpr = within.shape[0]
    stage = at % STAGES
    mbarrier.wait(ready.index(stage), (at // STAGES) & 1)
    q, k = q_buf.index(stage), k_buf.index(stage)
    P = gl.zeros([C, C], gl.float32, P_layout)
    P = warpgroup_mma(q, k.permute((1, 0)), P, use_acc=False, is_async=True)
    Sb = gl.convert_layout(S.to(dtype), O_operand)
    o = gl.zeros([S.shape[0], C], gl.float32, O_layout)
    o = warpgroup_mma(Sb, q.permute((1, 0)), o, use_acc=False, is_async=True)
    vt, vs = values_of(v_buf.index(stage), ages, V_operand, dtype)
    S = S * decay
    P = warpgroup_mma_wait(1, deps=(P,))
    p_buf.store((P * within).to(dtype))
    fence_async_shared()
    gl.thread_barrier()
    o = warpgroup_mma_wait(0, deps=(o,))
    o = o * entered[None, :]
    vt = gl.convert_layout(vt, O_operand)
    o = warpgroup_mma(vt, p_buf.permute((1, 0)), o, is_async=True)
    S = warpgroup_mma(vs, k, S, is_async=True)
    return warpgroup_mma_wait(1, deps=(o,)), S


@gluon.jit
def _compute_segment(
    S, o_desc, o_ptr, buffers, o_bufs, p_buf, bars, row, stops, pool, pool_slot, log2_decay, gain,
    within, entered, at, head, first_v, o_token, o_head, state_k, state_v, K: gl.constexpr,
    V: gl.constexpr, A_layout: gl.constexpr, REVERSE: gl.constexpr, HAS_STOPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The state after a segment, and the number of chunks so far."""
    C: gl.constexpr = within.shape[0]
    start, end = gl.load(row), gl.load(row + 1)
    kept, end_stop = gl.load(row + 5), gl.load(row + 6)
    done = 0
    ages = ages_of(log2_decay, C, gain, A_layout, C, REVERSE)
    decay = decayed(log2_decay * C)
    while done < end - start:
        until = next_stop(stops, kept, end_stop, end - start, HAS_STOPS)
        size = gl.minimum(C, until - done)
        if HAS_STOPS:
            ages = ages_of(log2_decay, size, gain, A_layout, C, REVERSE)
            decay = decayed(log2_decay * size)
        else:
            if size < C:
                ages = ages_of(log2_decay, size, gain, A_layout, C, REVERSE)
                decay = decayed(log2_decay * size)
        o, S = _scan_chunk(S, buffers, p_buf, bars, at, within, entered, ages, decay, STAGES)
        first = end - done - C if REVERSE else start + done
        tma.store_wait(1)
        store_output(
            o_desc, o_ptr, o_bufs.index(at % 2), o, first, head, first_v, o_token, o_head, size, C,
            V, REVERSE, o_bufs.dtype,
        )  # fmt: skip
        S = warpgroup_mma_wait(0, deps=(S,))
        gl.thread_barrier()
        mbarrier.arrive(bars[1].index(at % STAGES), count=1)
        done += size
        at += 1
        if HAS_STOPS:
            while (kept < end_stop) & (next_stop(stops, kept, end_stop, done + 1, True) <= done):
                slot = gl.load(stops + 2 * kept + 1).to(gl.int64)
                keep(pool + slot * pool_slot, head, S, state_k, state_v, 0, first_v, K, V)
                kept += 1
    return S, at


@gluon.jit
def _compute_all(
    o_desc, o_ptr, buffers, o_bufs, p_buf, weights, bars, table, deal, stops, log_decay, scale,
    horizon, state_in, state_between, state_out, pool, pool_slot, works, H, o_token, o_head,
    state_k, state_v, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
    C: gl.constexpr, TILES: gl.constexpr, REVERSE: gl.constexpr, HAS_IN: gl.constexpr,
    HAS_BETWEEN: gl.constexpr, HAS_OUT: gl.constexpr, HAS_STOPS: gl.constexpr,
    OUTPUT: gl.constexpr, IS_EVEN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All turns of a program whose heads have at most 128 key columns."""
    groups: gl.constexpr = BV // 64
    S_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * groups, 1], [16, BK, 16])
    O_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * groups, 1], [16, C, 16])
    P_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, groups], [16, C // groups, 16])
    E_layout: gl.constexpr = gl.SliceLayout(0, O_layout)
    A_layout: gl.constexpr = gl.SliceLayout(0, gl.DotOperandLayout(0, S_layout, 2))
    gain = scale if REVERSE else 1.0
    at = 0
    first_turn, end_turn = turns(deal, works, IS_EVEN)
    _, last_head, _ = place(table, work_at(first_turn, deal, IS_EVEN), H, TILES, BV)
    log2_decay = rate(log_decay, last_head)
    within = within_of(log2_decay, scale, P_layout, C, REVERSE)
    entered = entered_of(log2_decay, scale, E_layout, C, REVERSE)
    if OUTPUT:
        # Also where a first segment needs no state: programs that begin together read neighbouring
        # heads of the same tokens, which memory likes.
        gdc_wait()
    for turn in range(first_turn, end_turn):
        work = work_at(turn, deal, IS_EVEN)
        row, head, first_v = place(table, work, H, TILES, BV)
        length, sequence = gl.load(row + 1) - gl.load(row), gl.load(row + 2)
        slot = gl.load(row + 3)
        if head != last_head:
            log2_decay = rate(log_decay, head)
            within = within_of(log2_decay, scale, P_layout, C, REVERSE)
            entered = entered_of(log2_decay, scale, E_layout, C, REVERSE)
            last_head = head
        S = gl.zeros([BV, BK], gl.float32, S_layout)
        if OUTPUT:
            S = first_state(
                S, state_in, state_between, sequence, slot, head, H, state_k, state_v, 0, first_v,
                K, V, HAS_IN, HAS_BETWEEN,
            )  # fmt: skip
            S, at = _compute_segment(
                S, o_desc, o_ptr, buffers, o_bufs, p_buf, bars, row, stops, pool, pool_slot,
                log2_decay, gain, within, entered, at, head, first_v, o_token, o_head, state_k,
                state_v, K, V, A_layout, REVERSE, HAS_STOPS, STAGES,
            )  # fmt: skip
            if HAS_OUT:
                if gl.load(row + 4) == 1:
                    keep(state_out, sequence * H + head, S, state_k, state_v, 0, first_v, K, V)
        else:
            done = forgotten(log2_decay, length, gl.load(row + 7), horizon, C)
            S, at = _add_piece(
                S, buffers, bars, at, (length - done) // C, log2_decay, gain, A_layout, C, REVERSE,
                STAGES,
            )  # fmt: skip
            if done < length:
                keep(state_between, slot * H + head, S, state_k, state_v, 0, first_v, K, V)
    tma.store_wait(0)


# Segments times heads change with the rows of a step.
@launched
@gluon.jit(do_not_specialize=["works"])
def hopper_scan_kernel(
    q_desc, k_desc, v_desc, o_desc, o_ptr, log_decay, scale, horizon, state_in, state_between,
    state_out, pool, pool_slot, table, deal, stops, works, H, o_token, o_head, state_k, state_v,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    TILES: gl.constexpr, REVERSE: gl.constexpr, HAS_IN: gl.constexpr, HAS_BETWEEN: gl.constexpr,
    HAS_OUT: gl.constexpr, HAS_STOPS: gl.constexpr, OUTPUT: gl.constexpr, IS_EVEN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Arguments as triton_scan.scan_kernel; descriptors are of [tokens, H, width] by [C, 1, part].

    TILES: value tiles of a head, of BV columns. A part is BV or BK columns, 128 at most.
    """
    dtype: gl.constexpr = k_desc.dtype
    width: gl.constexpr = k_desc.block_shape[2]
    PARTS: gl.constexpr = BK // width
    K_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, width], dtype)
    V_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], dtype)
    q_buf = gl.allocate_shared_memory(dtype, [STAGES * PARTS if OUTPUT else 1, C, width], K_layout)
    k_buf = gl.allocate_shared_memory(dtype, [STAGES * PARTS, C, width], K_layout)
    v_buf = gl.allocate_shared_memory(dtype, [STAGES, C, BV], V_layout)
    o_bufs = gl.allocate_shared_memory(dtype, [2 if OUTPUT else 1, C, BV], V_layout)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    p_buf = gl.allocate_shared_memory(dtype, [C, C], p_layout)
    weights = weight_buffers(C) if PARTS > 1 else ()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    buffers = (q_buf, k_buf, v_buf)
    bars = (ready, empty)
    if not OUTPUT:
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (compute_wide if PARTS > 1 else _compute_all, (
                o_desc, o_ptr, buffers, o_bufs, p_buf, weights, bars, table, deal, stops,
                log_decay, scale, horizon, state_in, state_between, state_out, pool, pool_slot,
                works, H, o_token, o_head, state_k, state_v, K, V, BK, BV, C, TILES, REVERSE,
                HAS_IN, HAS_BETWEEN, HAS_OUT, HAS_STOPS, OUTPUT, IS_EVEN, STAGES,
            )),
            (load_all, (
                (q_desc, k_desc, v_desc), buffers, bars, table, deal, stops, log_decay, horizon,
                works, H, BV, C, TILES, PARTS, REVERSE, HAS_STOPS, OUTPUT, IS_EVEN, STAGES,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip
