"""What both schedules of the kernel for Hopper GPUs share: decays, states in memory, outputs."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sevenfold.ops.lightning.triton_scan import power


@gluon.jit
def ages_of(log2_decay, size, gain, layout: gl.constexpr, C: gl.constexpr, REVERSE: gl.constexpr):
    """b: the weight of each token of a chunk in the state after it, 0 beyond its tokens."""
    ar = gl.arange(0, C, layout=layout)
    to_exit = size - (C - 1 - ar) if REVERSE else size - 1 - ar
    outside = (C - 1 - ar >= size) if REVERSE else (ar >= size)
    return gl.where(outside, 0.0, power(log2_decay, to_exit) * gain)


@gluon.jit
def within_of(log2_decay, scale, layout: gl.constexpr, C: gl.constexpr, REVERSE: gl.constexpr):
    """M: the weight of token j in the output of token i, 0 where j comes later."""
    i = gl.arange(0, C, layout=gl.SliceLayout(1, layout))[:, None]
    j = gl.arange(0, C, layout=gl.SliceLayout(0, layout))[None, :]
    return power(log2_decay, j - i if REVERSE else i - j) * scale


@gluon.jit
def entered_of(log2_decay, scale, layout: gl.constexpr, C: gl.constexpr, REVERSE: gl.constexpr):
    """a: the weight of the state before a chunk in the output of each token."""
    ar = gl.arange(0, C, layout=layout)
    if REVERSE:
        return power(log2_decay, C - 1 - ar)
    return power(log2_decay, ar + 1) * scale


@gluon.jit
def _cells(S, matrix, state_k, state_v, first_k, first_v, K: gl.constexpr, V: gl.constexpr):
    """Where the cells of S^T lie, and which of them there are."""
    layout: gl.constexpr = S.type.layout
    v = first_v + gl.arange(0, S.shape[0], layout=gl.SliceLayout(1, layout))[:, None]
    k = first_k + gl.arange(0, S.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
    return matrix.to(gl.int64) * (K * V) + v * state_v + k * state_k, (v < V) & (k < K)


@gluon.jit
def keep(states, matrix, S, state_k, state_v, first_k, first_v, K: gl.constexpr, V: gl.constexpr):
    """Write S^T, whose first cell is that of a key column and a value column."""
    at, inside = _cells(S, matrix, state_k, state_v, first_k, first_v, K, V)
    gl.store(states + at, S, mask=inside)


@gluon.jit
def first_state(
    S, state_in, state_between, sequence, slot, head, H, state_k, state_v, first_k, first_v,
    K: gl.constexpr, V: gl.constexpr, HAS_IN: gl.constexpr, HAS_BETWEEN: gl.constexpr,
):  # fmt: skip
    """The state that a segment meets; S, of zeros, where there is none."""
    if HAS_IN:
        if slot < 0:
            matrix = sequence * H + head
            at, inside = _cells(S, matrix, state_k, state_v, first_k, first_v, K, V)
            S = gl.load(state_in + at, mask=inside, other=0.0)
    if HAS_BETWEEN:
        if slot >= 0:
            matrix = slot * H + head
            at, inside = _cells(S, matrix, state_k, state_v, first_k, first_v, K, V)
            S = gl.load(state_between + at, mask=inside, other=0.0)
    return S


@gluon.jit
def values_of(v_buf, ages, layout: gl.constexpr, dtype: gl.constexpr):
    """V^T as a register operand, and the same by age."""
    vt = v_buf.permute((1, 0)).load(layout)
    return vt, (vt.to(gl.float32) * ages[None, :]).to(dtype)


@gluon.jit
def aged_values(v_buf, ready, at, ages, dtype: gl.constexpr, STAGES: gl.constexpr):
    """V^T of a chunk by age, once it has come."""
    V_operand: gl.constexpr = ages.type.layout.parent
    stage = at % STAGES
    mbarrier.wait(ready.index(stage), (at // STAGES) & 1)
    _, vs = values_of(v_buf.index(stage), ages, V_operand, dtype)
    return vs


@gluon.jit
def store_output(
    o_desc, o_ptr, o_buf, o, row, head, first_v, o_token, o_head, size, C: gl.constexpr,
    V: gl.constexpr, REVERSE: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Write O^T of a chunk: whole chunks by a bulk copy, others row by row."""
    ob = o.to(dtype)
    if size == C:
        o_buf.permute((1, 0)).store(ob)
        fence_async_shared()
        gl.thread_barrier()
        chunk = o_buf.reshape(o_desc.block_shape)
        tma.async_copy_shared_to_global(o_desc, [row, head, first_v], chunk)
    else:
        layout: gl.constexpr = o.type.layout
        token = gl.arange(0, C, layout=gl.SliceLayout(0, layout))
        value = first_v + gl.arange(0, o.shape[0], layout=gl.SliceLayout(1, layout))
        inside = (token >= C - size) if REVERSE else (token < size)
        at = (row + token).to(gl.int64)[None, :] * o_token + (head * o_head + value)[:, None]
        gl.store(o_ptr + at, ob, mask=inside[None, :] & (value < V)[:, None])
        # Buffers take turns by chunks: the next one may be that of the last bulk copy.
        tma.store_wait(0)
