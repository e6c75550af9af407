"""The warps that compute, of the kernel for Hopper GPUs, for heads of 129 to 256 key columns.

S^T of a value tile is 128 x 256 in fp32, half of the registers there are. So it is kept as two
halves, S0 and S1, of which one at a time is copied to be an operand, and the weights of a chunk's
tokens, which the other schedule keeps in registers, lie in shared memory. S1 has 64 key columns
where K is at most 192, else 128 as S0.

    P = (Q K^T) * M
    O^T = (S0^T Q0^T + S1^T Q1^T) diag(a) + V^T P^T
    Si^T = decay^r Si^T + (V^T diag(b)) Ki

Registers that a product has written are read only while no product is on its way: else the
assembler lets it wait for all of them.
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
from triton.language.extra.cuda import gdc_wait

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
from sevenfold.ops.lightning.triton_hopper_load import next_stop, place, turns, work_at
from sevenfold.ops.lightning.triton_scan import decayed, forgotten, rate


@gluon.jit
def weight_buffers(C: gl.constexpr):
    """Room for M [C, C], a [C] and b [C]."""
    square: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    within = gl.allocate_shared_memory(gl.float32, [C, C], square)
    entered = gl.allocate_shared_memory(gl.float32, [C], line)
    ages = gl.allocate_shared_memory(gl.float32, [C], line)
    return within, entered, ages


@gluon.jit
def _set_weights(
    weights, log2_decay, scale, P_layout: gl.constexpr, L_layout: gl.constexpr, C: gl.constexpr,
    REVERSE: gl.constexpr,
):  # fmt: skip
    """M and a of a head; b changes with a chunk's tokens."""
    within, entered, _ = weights
    within.store(within_of(log2_decay, scale, P_layout, C, REVERSE))
    entered.store(entered_of(log2_decay, scale, L_layout, C, REVERSE))


@gluon.jit
def _halves(buffer, stage, rest: gl.constexpr):
    """The first 128 columns of a chunk of q or k, and the rest of them."""
    first, second = buffer.index(2 * stage), buffer.index(2 * stage + 1)
    return first, second if rest == second.shape[1] else second.slice(0, rest, dim=1)


@gluon.jit
def _add_to_halves(S0, S1, vs, k_buf, stage):
    """Si^T + (V^T diag(b)) Ki, on its way."""
    k0, k1 = _halves(k_buf, stage, S1.shape[1])
    S0 = warpgroup_mma(vs, k0, S0, is_async=True)
    # The same registers, by another name where the second half is narrower.
    vs = gl.convert_layout(vs, gl.DotOperandLayout(0, S1.type.layout, 2))
    return S0, warpgroup_mma(vs, k1, S1, is_async=True)


@gluon.jit
def _add_piece(
    S0, S1, buffers, bars, at, chunks, log2_decay, gain, A_layout: gl.constexpr, C: gl.constexpr,
    REVERSE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The state after a piece, whose output nobody asks for; its chunks are whole."""
    _, k_buf, v_buf = buffers
    ready, empty = bars
    dtype: gl.constexpr = k_buf.dtype
    ages = ages_of(log2_decay, C, gain, A_layout, C, REVERSE)
    decay = decayed(log2_decay * C)
    if chunks > 0:
        vs = aged_values(v_buf, ready, at, ages, dtype, STAGES)
        for chunk in range(chunks):
            S0, S1 = S0 * decay, S1 * decay
            S0, S1 = _add_to_halves(S0, S1, vs, k_buf, at % STAGES)
            coming = vs
            if chunk + 1 < chunks:
                coming = aged_values(v_buf, ready, at + 1, ages, dtype, STAGES)
            # The products read vs from registers until they are waited for.
            S0, S1, vs = warpgroup_mma_wait(0, deps=(S0, S1, vs))
            vs = coming
            gl.thread_barrier()
            mbarrier.arrive(empty.index(at % STAGES), count=1)
            at += 1
    return S0, S1, at


@gluon.jit
def _scores(q0, q1, k_buf, stage, P_layout: gl.constexpr, C: gl.constexpr):
    """Q K^T of a chunk, on its way."""
    k0, k1 = _halves(k_buf, stage, q1.shape[1])
    P = gl.zeros([C, C], gl.float32, P_layout)
    P = warpgroup_mma(q0, k0.permute((1, 0)), P, use_acc=False, is_async=True)
    return warpgroup_mma(q1, k1.permute((1, 0)), P, is_async=True)


@gluon.jit
def _scan_chunk(
    S0, S1, buffers, p_buf, weights, bars, at, decay, P_layout: gl.constexpr,
    O_layout: gl.constexpr, V_operand: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """O^T of a chunk, and the state after it, which the matrix unit may still be adding to."""
    q_buf, k_buf, v_buf = buffers
    within, entered, ages = weights
    dtype: gl.constexpr = k_buf.dtype
    operand: gl.constexpr = gl.DotOperandLayout(0, O_layout, 2)
    A_layout: gl.constexpr = gl.SliceLayout(0, V_operand)
    stage = at % STAGES
    half = gl.convert_layout(S0.to(dtype), operand)
    S0 = S0 * decay
    mbarrier.wait(bars[0].index(stage), (at // STAGES) & 1)
    q0, q1 = _halves(q_buf, stage, S1.shape[1])
    P = _scores(q0, q1, k_buf, stage, P_layout, C)
    o = gl.zeros([S0.shape[0], C], gl.float32, O_layout)
    o = warpgroup_mma(half, q0.permute((1, 0)), o, use_acc=False, is_async=True)
    P = warpgroup_mma_wait(1, deps=(P,))
    p_buf.store((P * within.load(P_layout)).to(dtype))
    fence_async_shared()
    gl.thread_barrier()
    o, half = warpgroup_mma_wait(0, deps=(o, half))
    half = gl.convert_layout(S1.to(dtype), operand)
    S1 = S1 * decay
    o = warpgroup_mma(half, q1.permute((1, 0)), o, is_async=True)
    vt, vs = values_of(v_buf.index(stage), ages.load(A_layout), V_operand, dtype)
    vt = gl.convert_layout(vt, operand)
    o, half = warpgroup_mma_wait(0, deps=(o, half))
    o = o * entered.load(gl.SliceLayout(0, O_layout))[None, :]
    o = warpgroup_mma(vt, p_buf.permute((1, 0)), o, is_async=True)
    S0, S1 = _add_to_halves(S0, S1, vs, k_buf, stage)
    o, vt = warpgroup_mma_wait(2, deps=(o, vt))
    return o, S0, S1, vs


@gluon.jit
def _compute_segment(
    S0, S1, o_desc, o_ptr, buffers, o_bufs, p_buf, weights, bars, row, stops, pool, pool_slot,
    log2_decay, gain, at, head, first_v, o_token, o_head, state_k, state_v, K: gl.constexpr,
    V: gl.constexpr, P_layout: gl.constexpr, O_layout: gl.constexpr, V_operand: gl.constexpr,
    L_layout: gl.constexpr, C: gl.constexpr, REVERSE: gl.constexpr, HAS_STOPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The state after a segment, and the number of chunks so far."""
    start, end = gl.load(row), gl.load(row + 1)
    kept, end_stop = gl.load(row + 5), gl.load(row + 6)
    done, aged = 0, 0
    while done < end - start:
        until = next_stop(stops, kept, end_stop, end - start, HAS_STOPS)
        size = gl.minimum(C, until - done)
        if size != aged:
            # Read behind the barrier of P, and before the one that ends the chunk.
            weights[2].store(ages_of(log2_decay, size, gain, L_layout, C, REVERSE))
            aged = size
        o, S0, S1, vs = _scan_chunk(
            S0, S1, buffers, p_buf, weights, bars, at, decayed(log2_decay * size), P_layout,
            O_layout, V_operand, C, STAGES,
        )  # fmt: skip
        first = end - done - C if REVERSE else start + done
        store_output(
            o_desc, o_ptr, o_bufs.index(at % 2), o, first, head, first_v, o_token, o_head, size, C,
            V, REVERSE, o_bufs.dtype,
        )  # fmt: skip
        S0, S1, vs = warpgroup_mma_wait(0, deps=(S0, S1, vs))
        # The next chunk's output goes where the last one's came from.
        tma.store_wait(1)
        gl.thread_barrier()
        mbarrier.arrive(bars[1].index(at % STAGES), count=1)
        done += size
        at += 1
        if HAS_STOPS:
            while (kept < end_stop) & (next_stop(stops, kept, end_stop, done + 1, True) <= done):
                slot = gl.load(stops + 2 * kept + 1).to(gl.int64)
                _keep(pool + slot * pool_slot, head, S0, S1, state_k, state_v, first_v, K, V)
                kept += 1
    return S0, S1, at


@gluon.jit
def _first_state(
    S0, S1, state_in, state_between, sequence, slot, head, H, state_k, state_v, first_v,
    K: gl.constexpr, V: gl.constexpr, HAS_IN: gl.constexpr, HAS_BETWEEN: gl.constexpr,
):  # fmt: skip
    S0 = first_state(
        S0, state_in, state_between, sequence, slot, head, H, state_k, state_v, 0, first_v, K, V,
        HAS_IN, HAS_BETWEEN,
    )  # fmt: skip
    S1 = first_state(
        S1, state_in, state_between, sequence, slot, head, H, state_k, state_v, S0.shape[1],
        first_v, K, V, HAS_IN, HAS_BETWEEN,
    )  # fmt: skip
    return S0, S1


@gluon.jit
def _keep(states, matrix, S0, S1, state_k, state_v, first_v, K: gl.constexpr, V: gl.constexpr):
    keep(states, matrix, S0, state_k, state_v, 0, first_v, K, V)
    keep(states, matrix, S1, state_k, state_v, S0.shape[1], first_v, K, V)


@gluon.jit
def compute_wide(
    o_desc, o_ptr, buffers, o_bufs, p_buf, weights, bars, table, deal, stops, log_decay, scale,
    horizon, state_in, state_between, state_out, pool, pool_slot, works, H, o_token, o_head,
    state_k, state_v, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
    C: gl.constexpr, TILES: gl.constexpr, REVERSE: gl.constexpr, HAS_IN: gl.constexpr,
    HAS_BETWEEN: gl.constexpr, HAS_OUT: gl.constexpr, HAS_STOPS: gl.constexpr,
    OUTPUT: gl.constexpr, IS_EVEN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All turns of a program: BV is 128, BK 128 and a rest that may be 64 columns narrower."""
    REST: gl.constexpr = 64 if K <= 192 else BK // 2
    S_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BK // 2, 16])
    R_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, REST, 16])
    O_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C, 16])
    P_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    V_operand: gl.constexpr = gl.DotOperandLayout(0, S_layout, 2)
    L_layout: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    gain = scale if REVERSE else 1.0
    at = 0
    first_turn, end_turn = turns(deal, works, IS_EVEN)
    _, last_head, _ = place(table, work_at(first_turn, deal, IS_EVEN), H, TILES, BV)
    log2_decay = rate(log_decay, last_head)
    if OUTPUT:
        _set_weights(weights, log2_decay, scale, P_layout, L_layout, C, REVERSE)
        gdc_wait()
    for turn in range(first_turn, end_turn):
        work = work_at(turn, deal, IS_EVEN)
        row, head, first_v = place(table, work, H, TILES, BV)
        length, sequence = gl.load(row + 1) - gl.load(row), gl.load(row + 2)
        slot = gl.load(row + 3)
        if head != last_head:
            log2_decay = rate(log_decay, head)
            if OUTPUT:
                _set_weights(weights, log2_decay, scale, P_layout, L_layout, C, REVERSE)
            last_head = head
        S0 = gl.zeros([BV, BK // 2], gl.float32, S_layout)
        S1 = gl.zeros([BV, REST], gl.float32, R_layout)
        if OUTPUT:
            S0, S1 = _first_state(
                S0, S1, state_in, state_between, sequence, slot, head, H, state_k, state_v,
                first_v, K, V, HAS_IN, HAS_BETWEEN,
            )  # fmt: skip
            S0, S1, at = _compute_segment(
                S0, S1, o_desc, o_ptr, buffers, o_bufs, p_buf, weights, bars, row, stops, pool,
                pool_slot, log2_decay, gain, at, head, first_v, o_token, o_head, state_k, state_v,
                K, V, P_layout, O_layout, V_operand, L_layout, C, REVERSE, HAS_STOPS, STAGES,
            )  # fmt: skip
            if HAS_OUT:
                if gl.load(row + 4) == 1:
                    matrix = sequence * H + head
                    _keep(state_out, matrix, S0, S1, state_k, state_v, first_v, K, V)
        else:
            done = forgotten(log2_decay, length, gl.load(row + 7), horizon, C)
            S0, S1, at = _add_piece(
                S0, S1, buffers, bars, at, (length - done) // C, log2_decay, gain,
                gl.SliceLayout(0, V_operand), C, REVERSE, STAGES,
            )  # fmt: skip
            if done < length:
                matrix = slot * H + head
                _keep(state_between, matrix, S0, S1, state_k, state_v, first_v, K, V)
    tma.store_wait(0)
