"""The warp that loads, of the kernel for Hopper GPUs, and how programs take their segments.

Bulk tensor copies bring chunks as far ahead as shared memory reaches, also those of the next
segment.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sevenfold.ops.lightning.triton_scan import forgotten, rate


@gluon.jit
def turns(deal, works, IS_EVEN: gl.constexpr):
    """The first turn of this program and the one after its last."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    if IS_EVEN:
        first, last = 0, gl.cdiv(works - program, programs)
    else:
        first, last = gl.load(deal + program), gl.load(deal + program + 1)
    return first, last


@gluon.jit
def work_at(turn, deal, IS_EVEN: gl.constexpr):
    """Number of the segment, head and tile that a program takes in a turn."""
    programs = gl.num_programs(0)
    if IS_EVEN:
        work = turn * programs + gl.program_id(0)
    else:
        work = gl.load(deal + programs + 1 + turn)
    return work


@gluon.jit
def place(table, work, H, TILES: gl.constexpr, BV: gl.constexpr):
    """Row of the segment, head, and first value column; the tiles of a head are neighbours."""
    if TILES == 1:
        row, head, first_v = table + work // H * 8, work % H, 0
    else:
        unit = work // TILES
        row, head, first_v = table + unit // H * 8, unit % H, work % TILES * BV
    return row, head, first_v


@gluon.jit
def _load(
    descriptors, buffers, bars, at, row, head, first_v, PARTS: gl.constexpr, WITH_Q: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy one chunk into the next stage, when the warps that compute have left it."""
    q_desc, k_desc, v_desc = descriptors
    q_buf, k_buf, v_buf = buffers
    ready, empty = bars
    stage, phase = at % STAGES, (at // STAGES) & 1
    full = ready.index(stage)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    width: gl.constexpr = k_desc.block_shape[2]
    keys: gl.constexpr = PARTS * k_desc.block_type.nbytes
    size: gl.constexpr = keys + v_desc.block_type.nbytes
    mbarrier.expect(full, size + keys if WITH_Q else size)
    for part in gl.static_range(PARTS):
        at_part, first_k = stage * PARTS + part, part * width
        _copy_in(k_desc, row, head, first_k, full, k_buf.index(at_part))
        if WITH_Q:
            _copy_in(q_desc, row, head, first_k, full, q_buf.index(at_part))
    _copy_in(v_desc, row, head, first_v, full, v_buf.index(stage))
    return at + 1


@gluon.jit
def _copy_in(desc, row, head, first, full, buffer):
    """Some of one head's columns of a chunk; those that a narrower head lacks become 0."""
    chunk = buffer.reshape(desc.block_shape)
    tma.async_copy_global_to_shared(desc, [row, head, first], full, chunk)


@gluon.jit
def next_stop(stops, kept, end_stop, end, HAS_STOPS: gl.constexpr):
    """Tokens, from where the scan entered, at which the next state is kept, or the end."""
    until = end
    if HAS_STOPS:
        if kept < end_stop:
            until = gl.load(stops + 2 * kept)
    return until


@gluon.jit
def load_all(
    descriptors, buffers, bars, table, deal, stops, log_decay, horizon, works, H,
    BV: gl.constexpr, C: gl.constexpr, TILES: gl.constexpr, PARTS: gl.constexpr,
    REVERSE: gl.constexpr, HAS_STOPS: gl.constexpr, OUTPUT: gl.constexpr, IS_EVEN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the chunks of all segments that a program takes, in the order of its turns."""
    at = 0
    first_turn, end_turn = turns(deal, works, IS_EVEN)
    for turn in range(first_turn, end_turn):
        work = work_at(turn, deal, IS_EVEN)
        row, head, first_v = place(table, work, H, TILES, BV)
        start, end = gl.load(row), gl.load(row + 1)
        kept, end_stop = gl.load(row + 5), gl.load(row + 6)
        done = 0
        if not OUTPUT:
            done = forgotten(rate(log_decay, head), end - start, gl.load(row + 7), horizon, C)
        while done < end - start:
            until = next_stop(stops, kept, end_stop, end - start, HAS_STOPS)
            first = end - done - C if REVERSE else start + done
            at = _load(descriptors, buffers, bars, at, first, head, first_v, PARTS, OUTPUT, STAGES)
            done = gl.minimum(done + C, until)
            if HAS_STOPS:
                while (kept < end_stop) & (
                    next_stop(stops, kept, end_stop, done + 1, True) <= done
                ):
                    kept += 1
