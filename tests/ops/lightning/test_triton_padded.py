"""The scan kernels of a row that is filled in part: on a GPU, or tiny under the interpreter."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from decode_cases import gaps, spread
from kernel_device import DEVICE, DTYPES, INTERPRETED
from lightning_statements import Inputs, make_inputs
from torch import Tensor

from sevenfold.ops import PaddedCuts, Stop
from sevenfold.ops.lightning import eager, segments, triton_launch, triton_op
from sevenfold.ops.lightning.triton_padding import clear_behind
from sevenfold.ops.lightning.triton_short import MOST_KEYS, MOST_TOKENS, run_short, suits_short
from sevenfold.ops.testing import check_error, poisoned_allocations

pytestmark = [pytest.mark.filterwarnings("ignore:lightning_scan has no tuning")]
if not INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

LOW = DTYPES[-1]
if INTERPRETED:
    WIDTHS, T, PIECE_TOKENS, LENGTHS = [(16, 24)], 190, 32, [190, 1, 64, 70, 129]
    RATES, PADDED_DTYPES = (-0.3, -5e-5), [torch.float32]
    SHORT_WIDTHS, SHORT_ROWS = [(12, 24)], [(40, [40, 1, 17]), (16, [15])]
else:
    WIDTHS, T, PIECE_TOKENS = [(128, 128), (64, 64), (96, 256), (256, 256)], 6144, 1024
    LENGTHS = [6144, 1, 63, 64, 65, 1000, 2047, 2048, 2049, 4096, 4100, 6143]
    RATES, PADDED_DTYPES = "mixed", list(DTYPES)
    SHORT_WIDTHS = [(128, 128), (64, 64), (96, 256), (7, 5)]
    SHORT_ROWS = [(n, sorted({1, n // 2, n - 1, n})) for n in (16, 32, 64, 80, 96, 128)]
    SHORT_ROWS += [(1, [1])]


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut T tokens into several segments, and those into pieces."""
    monkeypatch.setattr(segments, "MIN_SEGMENT_TOKENS", 2 * PIECE_TOKENS)
    monkeypatch.setattr(segments, "MIN_PIECE_TOKENS", PIECE_TOKENS)
    monkeypatch.setattr(triton_launch, "num_sms", lambda _device: 64)
    monkeypatch.setattr(triton_launch, "_STATE_BYTES_PER_TOKEN", 256)
    segments.plan_segments.cache_clear()


class Row:
    """Tables and inputs of one row of tokens, used for one length after another."""

    def __init__(
        self, K: int, V: int, dtype: torch.dtype, most_stops: int, tokens: int = T
    ) -> None:
        self.x = Inputs(*(y.to(DEVICE) for y in make_inputs(RATES, tokens, K=K, V=V, dtype=dtype)))
        H = self.x.q.shape[2]
        room = triton_op.padded_room(tokens, (H, K, V), self.x.q)
        self.cuts = PaddedCuts(tokens, most_stops, room, DEVICE)
        self.numbers = torch.zeros(self.cuts.num_numbers, dtype=torch.int32, device=DEVICE)
        self.plan = self.cuts.plan(self.numbers)
        self.pool, self.states = (
            spread(torch.full((8, H, K, V), 7.0, device=DEVICE)) for _ in range(2)
        )
        self.slots = torch.tensor([3], device=DEVICE)

    def run(self, num_tokens: int, stops: tuple[Stop, ...]) -> tuple[Tensor, Tensor]:
        """o and the final state; what does not count is no number."""
        host = np.zeros(self.cuts.num_numbers, np.int64)
        self.cuts.write(host, num_tokens, stops)
        self.numbers.copy_(torch.from_numpy(host))
        tokens = [y.clone() for y in self.x[:3]]
        for y in tokens:
            y[:, num_tokens:] = float("nan")
        plan = self.plan
        tables = (plan.segments, plan.pieces, plan.chains, plan.stops, plan.deal)
        left = (self.states, self.slots)
        arguments = (self.x.log_decay, 0.5, self.x.initial_state, *left, self.pool, *tables)
        with poisoned_allocations():
            o = triton_op.lightning_scan_padded(*tokens, *arguments)
        return o, self.states[self.slots]

    def wanted(self, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = self.x.to(dtype)
        tokens = [y[:, :num_tokens] for y in x[:3]]
        state = {"initial_state": x.initial_state, "lengths": (num_tokens,)}
        return eager.forward(*tokens, x.log_decay, scale=0.5, **state)


def check_state(name: str, found: Tensor, row: Row, num_tokens: int, dtype: torch.dtype) -> None:
    honest = row.wanted(num_tokens, dtype)[1].to(dtype)
    check_error(name, found, honest, row.wanted(num_tokens, torch.float64)[1])


def check_run(row: Row, num_tokens: int, marks: Sequence[int], dtype: torch.dtype) -> None:
    """What comes out, the states that are kept after so many tokens, and nothing else."""
    row.pool.fill_(7.0)
    stops = tuple(Stop(0, at, 6 - i) for i, at in enumerate(marks))
    o, final = row.run(num_tokens, stops)
    honest, exact = row.wanted(num_tokens, dtype), row.wanted(num_tokens, torch.float64)
    check_error(f"o of {num_tokens}", o[:, :num_tokens], honest[0], exact[0])
    check_state(f"final of {num_tokens}", final, row, num_tokens, dtype)
    for _, at, slot in stops:
        check_state(f"slot {slot}", row.pool[slot : slot + 1], row, at, dtype)
    others = [slot for slot in range(8) if slot not in {stop.slot for stop in stops}]
    for pool in (row.pool[others], row.states[[0, 1, 2, 4, 5, 6, 7]]):
        assert bool((pool == 7).all())
    for pool in (row.pool, row.states):
        assert bool((gaps(pool) == 7).all())


@pytest.mark.parametrize("dtype", PADDED_DTYPES)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_one_table_serves_every_length(K: int, V: int, dtype: torch.dtype) -> None:
    row = Row(K, V, dtype, 0)
    assert len(row.plan.segments) > 2
    assert row.plan.num_slots > len(row.plan.segments) - 1
    for num_tokens in LENGTHS:
        check_run(row, num_tokens, (), dtype)


@pytest.mark.parametrize("dtype", [LOW])
@pytest.mark.parametrize(("K", "V"), WIDTHS[:2])
def test_states_are_kept_at_the_stops_of_each_run(K: int, V: int, dtype: torch.dtype) -> None:
    row = Row(K, V, dtype, 4)
    cut = 2 * PIECE_TOKENS
    courses = [(T - 1, (1, cut, T - 1)), (cut, (cut - 1,)), (T, ()), (T, (33, 34, cut + 1, T - 1))]
    for num_tokens, marks in courses:
        check_run(row, num_tokens, marks, dtype)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2])
@pytest.mark.parametrize(("tokens", "lengths"), SHORT_ROWS)
@pytest.mark.parametrize(("K", "V"), SHORT_WIDTHS)
def test_a_short_row_is_one_chunk(
    K: int, V: int, tokens: int, lengths: list[int], dtype: torch.dtype
) -> None:
    row = Row(K, V, dtype, 4, tokens)
    assert suits_short(row.x.q, row.plan)
    for num_tokens in lengths:
        check_run(row, num_tokens, sorted({1, num_tokens // 2 + 1, num_tokens}), dtype)


def test_a_short_row_of_no_token_writes_nowhere() -> None:
    row = Row(*SHORT_WIDTHS[0], LOW, 2, 40)
    plan = row.plan
    padded = ((row.states, torch.zeros_like(row.slots)), (row.pool, plan))
    run_short(tuple(row.x[:3]), row.x.log_decay, 0.5, None, *padded)
    for pool in (row.pool, row.states):
        assert bool((pool == 7).all())


def test_which_rows_are_short() -> None:
    row = Row(*SHORT_WIDTHS[0], LOW, 0, 40)
    q, plan = row.x.q, row.plan
    assert suits_short(q, plan)
    assert not suits_short(q.float(), plan)
    assert not suits_short(q.new_empty(1, MOST_TOKENS + 1, *q.shape[2:]), plan)
    assert not suits_short(q.new_empty(*q.shape[:3], MOST_KEYS + 1), plan)
    assert not suits_short(q, replace(plan, segments=plan.segments.repeat(2, 1)))


def test_recorded_on_zeros_it_writes_to_the_first_slot_at_most() -> None:
    row = Row(*WIDTHS[0], LOW, 2)
    plan = row.plan
    tables = (plan.segments, plan.pieces, plan.chains, plan.stops, plan.deal)
    tokens = [y.clone() for y in row.x[:3]]
    left = (row.states, torch.zeros_like(row.slots))
    arguments = (row.x.log_decay, 0.5, row.x.initial_state, *left, row.pool, *tables)
    with poisoned_allocations():
        triton_op.lightning_scan_padded(*tokens, *arguments)
    assert bool((row.pool == 7).all())
    assert bool((row.states[1:] == 7).all())


def test_zeros_behind_what_counts() -> None:
    q, k, v = (torch.ones(1, 40, 3, width, device=DEVICE) for width in (12, 24, 5))
    k = k[..., ::2]
    table = torch.zeros(3, 8, dtype=torch.int32, device=DEVICE)
    table[:, 1] = torch.tensor([17, 21, 21])
    clear_behind(q, k, v, table, 8)
    for x in (q, k, v):
        assert bool((x[:, :21] == 1).all())
        assert bool((x[:, 21:29] == 0).all())
        assert bool((x[:, 29:] == 1).all())
    table[:, 1] = 36
    clear_behind(q, k, v, table, 8)
    for x in (q, k, v):
        assert bool((x[:, 29:36] == 1).all())
        assert bool((x[:, 36:] == 0).all())
