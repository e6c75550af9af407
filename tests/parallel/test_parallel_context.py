"""How a packed row is cut, what travels between ranks, and states against the recurrence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sevenfold.ops import layer_log_decay, lightning_attention
from sevenfold.ops.testing import check_error
from sevenfold.parallel import ContextBatch, divide_row
from sevenfold.parallel.context import states as states_module
from sevenfold.parallel.context.keys import Step, plan_keys
from sevenfold.parallel.context.lightning import _Decayed, _outgoing, plan_states
from sevenfold.parallel.context.softmax import RING_BYTES, as_received, chosen_exchange, in_order
from sevenfold.parallel.context.states import Decay, add_read, added_states

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=8)
RANKS = st.integers(1, 4)


def divided(lengths: list[int], num_ranks: int) -> list[ContextBatch]:
    return [divide_row(lengths, num_ranks, rank, device=CPU) for rank in range(num_ranks)]


def filled(lengths: list[int], num_ranks: int) -> list[int]:
    """The lengths, with a last document that makes them divisible."""
    rest = -sum(lengths) % (2 * num_ranks)
    return [*lengths, rest] if rest else lengths


def tokens_of(batch: ContextBatch, row: Tensor) -> Tensor:
    return torch.cat([row[own] for own in batch.slices])


@given(LENGTHS, RANKS)
@settings(deadline=None, max_examples=40)
def test_stretches_hold_every_token_once_at_its_position(lengths: list[int], ranks: int) -> None:
    lengths = filled(lengths, ranks)
    parts = divided(lengths, ranks)
    row = torch.arange(sum(lengths))
    held = torch.cat([tokens_of(part, row) for part in parts])
    assert sorted(held.tolist()) == row.tolist()
    positions = torch.tensor([p for length in lengths for p in range(length)])
    begins = torch.tensor([i - p for i, p in enumerate(positions.tolist())])
    for part in parts:
        assert torch.equal(part.positions[0], tokens_of(part, positions))
        for stretch, piece in zip(part.stretches, part.first_pieces, strict=True):
            assert tokens_of(part, row)[piece.start] == part.cut.start(stretch)
            assert part.cut.enters(stretch) == bool(positions[part.cut.start(stretch)])
        for stretch, piece in zip(part.stretches, part.last_pieces, strict=True):
            last = part.cut.end(stretch) - 1
            assert tokens_of(part, row)[piece.tokens][-1] == last
            assert piece.length == last + 1 - max(int(begins[last]), part.cut.start(stretch))


def test_a_first_and_a_last_stretch_are_as_much_work_on_every_rank() -> None:
    work = []
    for part in divided([64], 4):
        work.append(sum(p + 1 for p in part.positions[0].tolist()))
    assert work == [64 * 65 // 2 // 4] * 4


@given(LENGTHS, RANKS, st.booleans())
@settings(deadline=None, max_examples=40)
def test_states_that_arrive_make_the_whole_documents_state(
    lengths: list[int], ranks: int, fast: bool
) -> None:
    lengths = filled(lengths, ranks)
    T = sum(lengths)
    q, k, v = torch.randn(3, T, 3, 2, generator=torch.Generator().manual_seed(T)).double()
    # The fastest loses all within 15 tokens, and no decay at all fades never.
    log_decay = torch.tensor([-6.0, -0.3, 0.0]) if fast else layer_log_decay(3, 0, 8)
    decay = Decay(log_decay.double(), tuple(log_decay.tolist()))
    parts = divided(lengths, ranks)
    plans = [plan_states(part.cut, part.rank, decay.on_host) for part in parts]
    added = [
        added_states(tokens_of(part, k), tokens_of(part, v), decay, part.last_pieces)
        for part in parts
    ]
    out = [_outgoing(states, plan) for states, plan in zip(added, plans, strict=True)]
    exact = recurrence(q, k, v, log_decay, lengths)
    for rank, (part, plan) in enumerate(zip(parts, plans, strict=True)):
        arrived = torch.cat([parcel(out[r], plans[r], rank) for r in range(ranks)])
        before = _Decayed.apply(arrived, plan, decay)
        own = [tokens_of(part, x)[None] for x in (q, k, v)]
        o = lightning_attention(*own, log_decay, cu_seqlens=part.cu_seqlens, impl="reference").o
        enters = zip(part.stretches, part.first_pieces, strict=True)
        pieces = [piece if part.cut.enters(c) else None for c, piece in enters]
        o = add_read(o, own[0][0], before, decay, pieces)
        truth = tokens_of(part, exact)
        check_error(f"rank {rank}", o[0], truth.float(), truth)


def parcel(outgoing: Tensor, plan, target: int) -> Tensor:
    """What one rank's buffer holds for another."""
    heads = [sum(3 - route.first_head for route in routes) for routes in plan.sent]
    return outgoing.split(heads)[target]


def recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, lengths: list[int]) -> Tensor:
    documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    run = [
        lightning_attention(*(x[None] for x in one), log_decay, impl="reference").o[0]
        for one in documents
    ]
    return torch.cat(run)


@pytest.mark.parametrize("block_elements", [1, 24, 2**25])
def test_the_gradients_of_what_states_add_and_give(
    block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states_module, "_BLOCK_ELEMENTS", block_elements)
    decay = Decay(torch.tensor([-30.0, -1e-3], dtype=torch.float64), (-30.0, -1e-3))
    (part,) = divided([5, 7], 1)
    q, k, v = torch.randn(3, 12, 2, 3, dtype=torch.float64, generator=torch.Generator())
    leaves = [x.clone().requires_grad_() for x in (k, v)]
    assert torch.autograd.gradcheck(
        lambda k, v: added_states(k, v, decay, [None, part.last_pieces[1]]), leaves
    )
    states = torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=torch.Generator())
    o = torch.zeros(1, 12, 2, 3, dtype=torch.float64).requires_grad_()
    leaves = [x.clone().requires_grad_() for x in (q, states)]
    assert torch.autograd.gradcheck(
        lambda q, states: add_read(o.clone(), q, states, decay, [None, part.first_pieces[1]]),
        leaves,
    )


def test_heads_that_have_decayed_to_nothing_are_not_sent() -> None:
    heads = (-1.0, -0.1, -1e-4)
    decay = Decay(torch.tensor(heads), heads)
    assert [decay.first_head(d) for d in (0, 87, 88, 873, 874)] == [0, 0, 1, 1, 2]
    # One document over eight stretches of 100 tokens: past the next one the fast head is 0.
    parts = divided([800], 4)
    plan = plan_states(parts[0].cut, 0, heads)
    first_heads = [[route.first_head for route in routes] for routes in plan.sent]
    # Stretch 0 is next to 1 on rank 1; stretch 7 ends the row, and sends nothing.
    assert first_heads == [[1], [0], [1], [1]]
    fast = plan_states(parts[0].cut, 0, (-1.0,))
    assert [len(routes) for routes in fast.sent] == [0, 1, 0, 0]
    assert [len(routes) for routes in fast.received] == [0, 1, 0, 0]


def test_powers_below_fp32_are_zero_and_no_decay_never_fades() -> None:
    decay = Decay(torch.tensor([-1.0, 0.0], dtype=torch.float64), (-1.0, 0.0))
    found = decay.powers(torch.tensor([0, 80, 100]))
    assert found[:, 1].tolist() == [1.0, 1.0, 1.0]
    assert found[1, 0] > 0
    assert found[2, 0] == 0.0
    assert decay.first_head(1 << 60) == 1


@given(LENGTHS, RANKS, st.one_of(st.none(), st.integers(1, 30)), st.booleans())
@settings(deadline=None, max_examples=50)
def test_every_query_meets_each_key_of_its_document_once(
    lengths: list[int], ranks: int, window: int | None, in_turn: bool
) -> None:
    lengths = filled(lengths, ranks)
    parts = divided(lengths, ranks)
    row = torch.arange(sum(lengths))
    plans = [plan_keys(part.cut, part.rank, window, in_turn=in_turn) for part in parts]
    assert len({len(plan) for plan in plans}) == 1
    for rank, part in enumerate(parts):
        seen: tuple[list[int], list[int]] = ([], [])
        for n, step in enumerate(plans[rank]):
            sent = [parcels(parts[r], plans[r][n], rank, row) for r in range(ranks)]
            rows = in_order(torch.cat(sent), step)
            assert torch.equal(as_received(rows, step), torch.cat(sent))
            assert not step.is_local or all(not len(x) for r, x in enumerate(sent) if r != rank)
            for slot, read in enumerate(step.reads):
                seen[slot].extend([] if read is None else rows[slice(*read)].tolist())
        for slot, stretch in enumerate(part.stretches):
            start = part.cut.start(stretch)
            first = part.cut.begun[stretch]
            first = first if window is None else max(first, start - window + 1)
            assert sorted(seen[slot]) == list(range(first, start))
            assert in_turn or seen[slot] == sorted(seen[slot])


def parcels(part: ContextBatch, step: Step, target: int, row: Tensor) -> Tensor:
    own = tokens_of(part, row)
    pieces = [own[p.start : p.start + p.count] for p in step.sent[target]]
    return torch.cat(pieces) if pieces else row[:0]


def test_keys_that_no_document_needs_are_not_sent() -> None:
    parts = divided([4, 4, 5, 3], 2)  # stretches of 4: only the third document crosses
    (step,) = plan_keys(parts[0].cut, 1, None, in_turn=False)
    assert [[p.count for p in sent] for sent in step.sent] == [[4], []]
    (only,) = plan_keys(parts[0].cut, 1, None, in_turn=True)
    assert only == plan_keys(parts[0].cut, 1, None, in_turn=True)[-1]


def test_a_document_that_begins_on_a_border_meets_nothing() -> None:
    cut = divided([4, 4, 8], 2)[0].cut
    assert [cut.enters(c) for c in range(4)] == [False, False, False, True]
    assert [cut.distance(c, 3) for c in range(4)] == [None, None, 0, None]
    assert [cut.distance(0, c) for c in range(4)] == [None] * 4


def test_long_rows_go_by_ring() -> None:
    k = torch.empty(RING_BYTES // 32, 2, 1, dtype=torch.bfloat16, device="meta")
    assert chosen_exchange(k, k, 4) == "gather"
    assert chosen_exchange(k, k, 5) == "ring"


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 \* num_ranks must divide the row's 10 tokens, got 4"):
        divide_row([3, 7], 2, 0, device=CPU)
