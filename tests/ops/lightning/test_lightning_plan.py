"""The plan of chunks and blocks: who stands where, and how far apart things lie."""

from itertools import accumulate

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.ops.lightning.plan import Block, plan_blocks

CPU = torch.device("cpu")
C, BLOCK = 4, 3
few = settings(derandomize=True, max_examples=60, deadline=None)
some_lengths = st.lists(st.integers(0, 11), min_size=1, max_size=6).map(tuple)


def plan(lengths: tuple[int, ...], reverse: bool) -> tuple[Block, ...]:
    return plan_blocks(lengths, C, BLOCK, reverse, CPU)


def slots(block: Block) -> list[tuple[int, int, int]]:
    """(chunk, slot, token) of every filled slot."""
    every = torch.arange(block.filled.numel()) if block.token_index is None else block.token_index
    tokens = (block.first_token + every).view(block.filled.shape)
    return [(n, c, int(tokens[n, c])) for n, c in block.filled.nonzero().tolist()]


@few
@given(lengths=some_lengths, reverse=st.booleans())
def test_every_token_stands_in_one_slot_and_in_order(
    lengths: tuple[int, ...], reverse: bool
) -> None:
    blocks = plan(lengths, reverse)
    in_order = reversed(blocks) if reverse else blocks
    tokens = [token for block in in_order for _, _, token in slots(block)]
    assert tokens == list(range(sum(lengths)))
    assert sum(block.num_tokens for block in blocks) == sum(lengths)
    assert all(len(block.sequences) <= BLOCK for block in blocks)


@few
@given(lengths=some_lengths, reverse=st.booleans())
def test_distances_are_those_between_tokens(lengths: tuple[int, ...], reverse: bool) -> None:
    first = [0, *accumulate(lengths)]
    sign = -1 if reverse else 1
    for block in plan(lengths, reverse):
        chunks: dict[int, list[int]] = {}
        for n, _, token in slots(block):
            chunks.setdefault(n, []).append(token)
        enter = {n: (tokens[-1] if reverse else tokens[0]) for n, tokens in chunks.items()}
        leave = {n: (tokens[0] if reverse else tokens[-1]) for n, tokens in chunks.items()}
        for n, c, token in slots(block):
            sequence = int(block.sequences[n])
            assert first[sequence] <= token < first[sequence + 1]
            assert int(block.rows[n, c]) == sign * (token - enter[n])
            assert int(block.to_end[n, c]) == sign * (leave[n] - token)
        for n in chunks:
            assert int(block.spans[n]) == sign * (leave[n] - enter[n])
            for m in chunks:
                same = block.sequences[n] == block.sequences[m]
                ahead = sign * (enter[n] - leave[m])
                expected = ahead if same and ahead > 0 else -1
                assert int(block.between[n, m]) == expected


@few
@given(lengths=some_lengths, reverse=st.booleans())
def test_empty_slots_pass_nothing_on(lengths: tuple[int, ...], reverse: bool) -> None:
    for block in plan(lengths, reverse):
        assert bool((block.to_end[~block.filled] < 0).all())


@few
@given(lengths=some_lengths, reverse=st.booleans())
def test_every_sequence_with_tokens_finishes_once(lengths: tuple[int, ...], reverse: bool) -> None:
    finished = [sequence for block in plan(lengths, reverse) for _, sequence in block.finishing]
    assert sorted(finished) == [n for n, length in enumerate(lengths) if length]


@few
@given(lengths=some_lengths, reverse=st.booleans())
def test_a_chunk_meets_either_the_entry_or_the_block_before(
    lengths: tuple[int, ...], reverse: bool
) -> None:
    blocks = plan(lengths, reverse)
    for i, block in enumerate(blocks):
        assert bool(((block.carried >= 0) != (block.entered >= 0)).all())
        before = int(blocks[i - 1].sequences[blocks[i - 1].last]) if i else -1
        assert set(block.sequences[block.carried >= 0].tolist()) <= {before}


def test_no_tokens_no_blocks() -> None:
    assert plan((0, 0), reverse=False) == ()
    assert plan((), reverse=True) == ()
