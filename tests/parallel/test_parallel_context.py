"""How a packed row is cut, what travels between ranks, and states against the recurrence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch import distributed as dist

from sevenfold.ops import (
    layer_log_decay,
    lightning_add_read,
    lightning_added,
    lightning_attention,
)
from sevenfold.ops.testing import check_error
from sevenfold.parallel import ContextBatch, divide_row
from sevenfold.parallel.context.keys import Step, plan_keys
from sevenfold.parallel.context.lightning import ContextLightning, entered, leaving
from sevenfold.parallel.context.softmax import RING_BYTES, as_received, chosen_exchange, in_order
from sevenfold.parallel.context.states import (
    first_head,
    gradients_of_arrived,
    outgoing,
    plan_states,
    returned,
    states_before,
)

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
    on_host = tuple(log_decay.tolist())
    parts = divided(lengths, ranks)
    plans = [plan_states(part.cut, part.rank, on_host) for part in parts]
    out = []
    for part, plan in zip(parts, plans, strict=True):
        own = (tokens_of(part, x) for x in (k, v))
        added = lightning_added(*own, log_decay, leaving(part, plan), from_end=True)
        out.append(outgoing(added, plan))
    exact = recurrence(q, k, v, log_decay, lengths)
    for rank, (part, plan) in enumerate(zip(parts, plans, strict=True)):
        arrived = torch.cat([parcel(out[r], plans[r], rank) for r in range(ranks)])
        before = states_before(arrived, plan, on_host)
        own = [tokens_of(part, x)[None] for x in (q, k, v)]
        o = lightning_attention(*own, log_decay, cu_seqlens=part.cu_seqlens, impl="reference").o
        lightning_add_read(o[0], own[0][0], before, log_decay, entered(part), from_end=False)
        truth = tokens_of(part, exact)
        check_error(f"rank {rank}", o[0], truth.float(), truth)


def parcel(outgoing: Tensor, plan, target: int) -> Tensor:
    """What one rank's buffer holds for another."""
    return outgoing.split(plan.sizes[0])[target]


def recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, lengths: list[int]) -> Tensor:
    documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    run = [
        lightning_attention(*(x[None] for x in one), log_decay, impl="reference").o[0]
        for one in documents
    ]
    return torch.cat(run)


@pytest.fixture
def alone():
    """A group of one process, which exchanges with itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Mixer:
    log_decay = torch.tensor([-30.0, -0.4, -1e-3, 0.0])


@pytest.mark.parametrize("lengths", [[8], [5, 7], [3, 6, 3], [2, 2, 4]])
def test_a_row_over_a_border_and_its_gradients_are_the_recurrences(
    lengths: list[int], alone: dist.ProcessGroup
) -> None:
    (part,), attend = divided(lengths, 1), ContextLightning(Mixer(), alone)
    seed = torch.Generator().manual_seed(sum(lengths))
    leaves = [
        x.requires_grad_()
        for x in torch.randn(3, 1, sum(lengths), 4, 3, generator=seed, dtype=torch.float64)
    ]
    do = torch.randn(1, sum(lengths), 4, 3, generator=seed, dtype=torch.float64)
    o = attend(*leaves, part, None)[0]
    whole = recurrence(*(x[0] for x in leaves), Mixer.log_decay, lengths)[None]
    found = [o.detach(), *torch.autograd.grad(o, leaves, do)]
    exact = [whole.detach(), *torch.autograd.grad(whole, leaves, do)]
    for name, ours, truth in zip(("o", "dq", "dk", "dv"), found, exact, strict=True):
        check_error(name, ours, truth.float(), truth)


def test_what_would_be_wrong_is_refused(alone: dist.ProcessGroup) -> None:
    class Forgetful:
        log_decay = torch.tensor([float("-inf"), -0.1])

    with pytest.raises(ValueError, match=r"log_decay must be finite on context ranks, got \(-inf"):
        ContextLightning(Forgetful(), alone)
    (part,), attend = divided([5, 7], 1), ContextLightning(Mixer(), alone)
    leaves = [torch.randn(1, 12, 4, 3, requires_grad=True) for _ in range(3)]
    o = attend(*leaves, part, None)[0]
    (dq,) = torch.autograd.grad(o.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@given(LENGTHS, RANKS)
@settings(deadline=None, max_examples=20)
def test_what_comes_back_of_states_is_the_transpose_of_what_was_sent(
    lengths: list[int], ranks: int
) -> None:
    heads = (-3.0, -0.2, 0.0)
    for part in divided(filled(lengths, ranks), ranks):
        plan = plan_states(part.cut, part.rank, heads)
        sent, received = (sum(way) for way in plan.sizes)
        seed = torch.Generator().manual_seed(sent + 100 * received)
        x, y = torch.randn(2, 2, 3, 2, 2, generator=seed, dtype=torch.float64)
        a, b = (torch.randn(n, 2, 2, generator=seed, dtype=torch.float64) for n in (sent, received))
        for ours, theirs in (
            ((outgoing(x, plan) * a).sum(), (x * returned(a, plan)).sum()),
            (
                (states_before(b, plan, heads) * y).sum(),
                (b * gradients_of_arrived(y, plan, heads)).sum(),
            ),
        ):
            torch.testing.assert_close(ours, theirs)


def test_heads_that_have_decayed_to_nothing_are_not_sent() -> None:
    heads = (-1.0, -0.1, -1e-4)
    assert [first_head(heads, d) for d in (0, 87, 88, 873, 874)] == [0, 0, 1, 1, 2]
    assert first_head((-1.0, 0.0), 1 << 60) == 1
    # One document over eight stretches of 100 tokens: past the next one the fast head is 0.
    parts = divided([800], 4)
    plan = plan_states(parts[0].cut, 0, heads)
    first_heads = [[route.first_head for route in routes] for routes in plan.sent]
    # Stretch 0 is next to 1 on rank 1; stretch 7 ends the row, and sends nothing.
    assert first_heads == [[1], [0], [1], [1]]
    fast = plan_states(parts[0].cut, 0, (-1.0,))
    assert [len(routes) for routes in fast.sent] == [0, 1, 0, 0]
    assert [len(routes) for routes in fast.received] == [0, 1, 0, 0]


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
