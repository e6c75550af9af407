"""The bytes of a training step: worked by hand for one block, and rules that any model keeps."""

from dataclasses import replace

import pytest

from sevenfold.models import MoEConfig, preset
from sevenfold.models.accounting import count_parameters
from sevenfold.models.feed_forward import PIECE_TOKENS
from sevenfold.models.training_memory import longest_tokens, training_memory

HYBRID = preset("1b-hybrid")
ONE = preset("nano-hybrid").model_copy(
    update={"layer_types": ("linear_attention",), "moe": None, "vocab_size": 100}
)


def test_one_block_by_hand() -> None:
    """128 wide, 4 heads of 32, SwiGLU of 256, 10 tokens, computed again."""
    found = training_memory(ONE, 10, recompute_every=1)
    total = 100 * 128 + (4 * 128 * 128 + 128 * 128) + 3 * 128 * 256 + 2 * 128 + 128 + 128
    assert count_parameters(ONE).total == total
    assert (found.weights, found.moments) == (4 * total, 8 * total)
    assert found.gradients == 4 * 100 * 128  # the tied head's alone
    assert found.cast_weights == 2 * (total - 100 * 128 - 128)
    assert found.gathered == 0
    assert found.batch == 10 * 24
    assert found.kept == 10 * 128 * 2
    inside = 3 * 128 * 2 + 9 * 128 * 2
    piece = 10 * (5 * 256 + 128) * 2  # all tokens are one piece
    assert found.working == 10 * (inside + 3 * 128 * 2) + piece + 3 * 128 * 256 * 4
    assert found.total == sum(vars(found).values())


def test_a_recomputed_feed_forward_is_wide_for_one_piece() -> None:
    some, more = (training_memory(ONE, n * PIECE_TOKENS, recompute_every=1) for n in (1, 3))
    once = PIECE_TOKENS * (5 * 256 + 128) * 2 + 3 * 128 * 256 * 4
    assert more.working - once == 3 * (some.working - once)


def test_a_block_that_is_kept_holds_its_feed_forward() -> None:
    found = training_memory(ONE, 10)
    inside = 3 * 128 * 2 + 9 * 128 * 2 + 3 * 256 * 2
    assert found.kept == 10 * 128 * 2
    assert found.working == 10 * (inside + 2 * 128 * 2 + 2 * 256 * 2)
    two = ONE.model_copy(update={"layer_types": ("linear_attention",) * 2})
    many = 10**7
    assert training_memory(two, many).kept == many * (2 * 128 * 2 + inside)


def test_an_fp32_stream_takes_more_where_the_stream_is() -> None:
    narrow, wide = (training_memory(ONE, 10, recompute_every=1, stream_bytes=s) for s in (2, 4))
    assert wide.kept == 2 * narrow.kept
    assert wide.working - narrow.working == 10 * 4 * 128 * 2


def test_softmax_and_experts_are_counted() -> None:
    softmax = ONE.model_copy(update={"layer_types": ("full_attention",)})
    lightning = training_memory(ONE, 10).working
    keys = 2 * 32  # two key heads of 32
    difference = (2 * 128 + 2 * keys) * 2 + 4 * 4 - 9 * 128 * 2
    assert training_memory(softmax, 10).working - lightning == 10 * difference
    moe = ONE.model_copy(update={"moe": MoEConfig(num_local_experts=4)})
    dense_part = 10 * (3 * 256 * 2 + 2 * 256 * 2)
    routed = 2 * 2 * 256 * 2 + 3 * 4 * 4 + 2 * (8 + 16) + 2 * (128 + 4 * 256) * 2
    for every in (1, None):
        assert training_memory(moe, 10, recompute_every=every).working == (
            lightning - dense_part + 10 * routed
        )


def test_softmax_attention_that_is_wider_than_the_feed_forward() -> None:
    """Four heads of 128 beside a stream of 128: q, k, v, o and their gradients, one in fp32 too."""
    changes = {"layer_types": ("full_attention",), "head_dim": 128, "intermediate_size": 1}
    found = training_memory(ONE.model_copy(update=changes), 10, recompute_every=1)
    queries, keys = 4 * 128, 2 * 128
    held = 128 * (2 + 2) + (3 * queries + 2 * keys) * 2 + 4 * 4
    assert found.working == 10 * (held + (queries + 2 * keys) * 2 + queries * 4)


def test_two_context_ranks_by_hand() -> None:
    """Half the weights, gradients and moments; own and other keys in the backward of a ring."""
    softmax = ONE.model_copy(update={"layer_types": ("full_attention",)})
    found = training_memory(softmax, 10, recompute_every=1, context_ranks=2)
    total, head = count_parameters(softmax).total, 100 * 128
    assert (found.weights, found.moments) == (2 * total, 4 * total)
    assert found.gradients == 4 * head  # whole until the backward ends
    assert found.gathered == 4 * (head + 128 + 4 * (total - head - 128))
    queries, keys = 128, 64
    held = 128 * (2 + 2) + (3 * queries + 2 * keys) * 2 + 4 * 4
    sums = (queries + 4 * keys) * 4  # of own queries and keys, of keys that arrived
    arrived = (2 * keys) * 2 * 3 + queries // 2 * (2 + 4)  # them, a copy, what attention gives
    assert found.working == max(
        10 * (held + sums + arrived),
        10 * (3 * 128 * 2 + (2 * queries + 2 * keys) * 2 + 4 * 4 + 3 * 128 * 2)
        + 10 * (5 * 256 + 128) * 2
        + 3 * 128 * 256 * 4,
    )


def test_a_million_tokens_of_the_1b_hybrid_on_two_gpus() -> None:
    """By hand: 524,288 tokens a rank, 1,536 wide, so that one bf16 vector of each is 1.61 GB.

    Inputs of 32 blocks, and of three softmax layers what they gave and its log-sum-exp; then the
    last block, softmax: what the norm gave and the stream's gradient
    (2), q, k, v, o and the gradient of o (5), in fp32 gradients of queries, own keys and values and
    those that have arrived (2 + 4 + 4), these keys and values, a copy, their gradients (6), and of
    half the queries a gradient in bf16 and in fp32 (1.5).
    """
    found = training_memory(HYBRID, 2**19, recompute_every=1, context_ranks=2)
    vector = 2**19 * 1536 * 2
    log_sum_exp = 2**19 * 16 * 4
    assert found.kept == 32 * vector + 3 * (vector + log_sum_exp)
    assert found.working == (2 + 5 + 10 + 6 + 1.5) * vector + log_sum_exp
    assert 105e9 < found.total < 107e9


@pytest.mark.parametrize("every", [1, 2, None])
def test_memory_grows_with_tokens_and_the_longest_is_the_last_that_fits(every: int | None) -> None:
    budget = 140 * 10**9
    longest = longest_tokens(HYBRID, budget, recompute_every=every)
    assert longest % 4096 == 0
    how = {"recompute_every": every}
    assert training_memory(HYBRID, longest, **how).total <= budget
    assert training_memory(HYBRID, longest + 4096, **how).total > budget
    assert longest_tokens(HYBRID, 10**9) == 0


def test_the_highest_point_is_the_worst_layer() -> None:
    """With few tokens late layers wait for nothing, and gradients of all others stand."""
    few, many = (training_memory(HYBRID, n, recompute_every=1) for n in (1, 10**6))
    head = 4 * HYBRID.vocab_size * HYBRID.hidden_size
    block = 4 * (count_parameters(HYBRID).total - HYBRID.hidden_size - head // 4) // 32
    assert many.gradients == head + block  # the last block is softmax, and the one before wider
    assert few.gradients > 0.9 * 4 * (count_parameters(HYBRID).total - HYBRID.hidden_size) - head
    assert replace(few, gradients=0).total < few.total
