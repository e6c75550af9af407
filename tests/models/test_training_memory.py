"""The bytes of a training step: worked by hand for one block, and rules that any model keeps."""

from dataclasses import replace

import pytest

from sevenfold.models import MoEConfig, preset
from sevenfold.models.accounting import count_parameters
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
    assert found.batch == 10 * 24
    assert found.kept == 10 * 128 * 2
    inside = 3 * 128 * 2 + 9 * 128 * 2 + 3 * 256 * 2
    assert found.working == 10 * (inside + 2 * 128 * 2 + 2 * 256 * 2)
    assert found.total == sum(vars(found).values())


def test_a_block_that_is_kept_is_not_counted_twice() -> None:
    again, kept = (training_memory(ONE, 10, recompute_every=every) for every in (1, None))
    assert (again.kept + again.working, again.total) == (kept.kept + kept.working, kept.total)


def test_an_fp32_stream_takes_more_where_the_stream_is() -> None:
    narrow, wide = (training_memory(ONE, 10, recompute_every=1, stream_bytes=s) for s in (2, 4))
    assert wide.kept == 2 * narrow.kept
    assert wide.working - narrow.working == 10 * 3 * 128 * 2


def test_softmax_and_experts_are_counted() -> None:
    softmax = ONE.model_copy(update={"layer_types": ("full_attention",)})
    lightning = training_memory(ONE, 10, recompute_every=1).working
    keys = 2 * 32  # two key heads of 32
    difference = (2 * 128 + 2 * keys) * 2 + (128 + keys) * 4 + 4 * 4 - 9 * 128 * 2
    assert training_memory(softmax, 10, recompute_every=1).working - lightning == 10 * difference
    moe = ONE.model_copy(update={"moe": MoEConfig(num_local_experts=4)})
    dense_part = 10 * (3 * 256 * 2 + 2 * 256 * 2)
    routed = 2 * 2 * 256 * 2 + 3 * 4 * 4 + 2 * (8 + 16) + 2 * (128 + 4 * 256) * 2
    assert training_memory(moe, 10, recompute_every=1).working == (
        lightning - dense_part + 10 * routed
    )


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
