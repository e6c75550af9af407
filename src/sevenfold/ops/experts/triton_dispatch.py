"""A counting sort of the tokens' choices by expert, without a word from the device to the host.

Every block of choices counts its experts; one program sums the counts before each block; every
block then knows where each of its choices goes. Sizes are those that the host knows: R is the most
rows that a capacity lets through.
"""

# Triton's decorator hides how a kernel is launched.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.operator import operator
from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.triton_launched import launched

# Choices times experts that a block compares at once.
_TILE_ELEMENTS = 8192
_MAX_BLOCK = 1024
_NO_LIMIT = 2**31 - 1


@triton.jit
def _chosen(experts_ptr, num_choices, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """This block's choices, and which expert each of them names, as ones in a matrix."""
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + choice, choice < num_choices, -1).to(tl.int32)
    return choice, (expert[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@launched
@triton.jit(do_not_specialize=["num_choices"])
def _count_kernel(experts_ptr, counts_ptr, num_choices, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    _, chosen = _chosen(experts_ptr, num_choices, BLOCK, EXPERTS)
    target = counts_ptr + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    tl.store(target, tl.sum(chosen, 0))


@launched
@triton.jit(do_not_specialize=["num_blocks", "capacity"])
def _scan_kernel(
    counts_ptr, first_ptr, rows_per_expert_ptr, num_blocks, num_experts, capacity,
    BLOCKS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Replace each block's counts by those before it, and place the experts end to end."""
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)[:, None]
        place = counts_ptr + block * EXPERTS + expert[None, :]
        counts = tl.load(place, block < num_blocks, 0)
        tl.store(place, tl.cumsum(counts, 0) - counts + total[None, :], block < num_blocks)
        total += tl.sum(counts, 0)
    kept = tl.minimum(total, capacity)
    tl.store(first_ptr + expert, tl.cumsum(kept, 0) - kept)
    tl.store(rows_per_expert_ptr + expert, kept, expert < num_experts)


@launched
@triton.jit(do_not_specialize=["num_choices", "num_rows", "capacity"])
def _place_kernel(
    experts_ptr, counts_ptr, first_ptr, choice_ptr, row_ptr, num_choices, num_rows, capacity,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    choice, chosen = _chosen(experts_ptr, num_choices, BLOCK, EXPERTS)
    expert = tl.arange(0, EXPERTS)
    before = tl.load(counts_ptr + tl.program_id(0) * EXPERTS + expert)
    rank = tl.sum(chosen * (tl.cumsum(chosen, 0) - 1 + before[None, :]), 1)
    first = tl.sum(chosen * tl.load(first_ptr + expert)[None, :], 1)
    kept = (choice < num_choices) & (rank < capacity)
    row = tl.where(kept, first + rank, num_rows).to(tl.int64)
    tl.store(row_ptr + choice, row, choice < num_choices)
    tl.store(choice_ptr + row, choice.to(tl.int64), kept)


def max_rows(num_choices: int, num_experts: int, capacity: int | None) -> int:
    """How many rows there can be at most."""
    return num_choices if capacity is None else min(num_choices, num_experts * capacity)


@operator("sevenfold::plan_dispatch")
def plan_dispatch(
    experts: Tensor, num_experts: int, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """choice, row and rows_per_expert; arguments as in the public operator."""
    choice, row, rows_per_expert = _results(experts, num_experts, capacity)
    EXPERTS = next_power_of_2(num_experts)
    BLOCK = min(_MAX_BLOCK, max(16, _TILE_ELEMENTS // EXPERTS))
    blocks = cdiv(experts.numel(), BLOCK)
    counts = torch.empty(blocks, EXPERTS, dtype=torch.int32, device=experts.device)
    first = torch.empty(EXPERTS, dtype=torch.int32, device=experts.device)
    most = _NO_LIMIT if capacity is None else capacity
    flat, sizes = experts.contiguous(), {"EXPERTS": EXPERTS}
    if blocks:
        _count_kernel[(blocks,)](flat, counts, flat.numel(), BLOCK=BLOCK, **sizes)
    _scan_kernel[(1,)](
        counts, first, rows_per_expert, blocks, num_experts, most,
        BLOCKS=max(1, _TILE_ELEMENTS // EXPERTS), **sizes,
    )  # fmt: skip
    if blocks:
        _place_kernel[(blocks,)](
            flat, counts, first, choice, row, flat.numel(), len(choice), most, BLOCK=BLOCK, **sizes
        )
    return choice, row, rows_per_expert


@plan_dispatch.register_fake
def _results(
    experts: Tensor, num_experts: int, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    R, device = max_rows(experts.numel(), num_experts, capacity), experts.device
    # A row that belongs to nobody names the first choice, so that whoever gathers it reads a token.
    choice = torch.zeros(R, dtype=torch.int64, device=device)
    row = torch.empty(experts.shape, dtype=torch.int64, device=device)
    return choice, row, torch.empty(num_experts, dtype=torch.int32, device=device)
