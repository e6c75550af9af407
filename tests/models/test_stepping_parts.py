"""Blocks that ranks hold in parts, by kernels, equal the whole block: on a GPU or interpreted."""

from collections.abc import Callable
from threading import Barrier, Lock, Thread

import pytest
import torch
from kernel_device import DEVICE, GPU_UNLESS_INTERPRETED, INTERPRETED
from model_cases import MOE, tiny_model
from torch import Tensor

from sevenfold.models import Batch, LinearState, PagedKV, PageTable, stepping, stepping_device
from sevenfold.models.block import Block, OverRanks
from sevenfold.models.stepping import run_by_rows
from sevenfold.ops.testing import check_error
from sevenfold.parallel.parts import parts_of, tensor_slice
from sevenfold.parallel.tensor import _divide_mixer, _divide_mlp

pytestmark = [
    *GPU_UNLESS_INTERPRETED,
    pytest.mark.filterwarnings("ignore:.*has no tuning"),
]
NUM_RANKS = 2
WIDTHS = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "rotary_dim": 8,
}
MIXES = {
    "lightning, experts": {"layers": "l", "moe": MOE},
    "lightning, groups, dense": {
        "layers": "l",
        "linear_attn_norm_groups": 2,
        "norm_placement": "pre_norm",
    },
    "softmax, dense": {"layers": "f"},
}


class InTurns:
    """Runs one function a rank in threads, of which one computes at a time, and sums for them."""

    def __init__(self) -> None:
        self._barrier, self._turn = Barrier(NUM_RANKS), Lock()
        self._parts: list[Tensor] = [torch.empty(0)] * NUM_RANKS
        self.num_sums = 0

    def add(self, rank: int, x: Tensor) -> Tensor:
        self._parts[rank] = x.clone()
        self._turn.release()
        self._barrier.wait(60)
        with self._turn:
            x.copy_(sum(self._parts))
            self.num_sums += 1
        self._barrier.wait(60)
        self._turn.acquire()
        return x

    def run(self, of_rank: Callable[[int], Tensor]) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * NUM_RANKS

        def one(rank: int) -> None:
            with self._turn, torch.inference_mode():
                found[rank] = of_rank(rank)

        threads = [Thread(target=one, args=(rank,)) for rank in range(NUM_RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's CPU take a GPU's way."""
    if INTERPRETED:
        monkeypatch.setattr(stepping, "_mix", stepping_device.device_mix)
        monkeypatch.setattr(stepping, "_feed", stepping_device.device_feed)


def block_of(mix: dict, dtype: torch.dtype) -> Block:
    [block] = tiny_model(dtype=dtype, **(WIDTHS | mix)).to(DEVICE).layers
    assert isinstance(block, Block)
    return block


def part_of(mix: dict, dtype: torch.dtype, rank: int, turns: InTurns) -> Block:
    """As parallel.divide_model leaves it, but for the group, which the kernels do not use."""
    block = block_of(mix, dtype)
    for name, parameter in block.named_parameters():
        own = tensor_slice(parameter.data, parts_of(f"layers.0.{name}"), rank, NUM_RANKS)
        parameter.data = own.clone(memory_format=torch.contiguous_format)
    _divide_mixer(block, rank, NUM_RANKS, None)
    _divide_mlp(block.mlp, False, None)
    block.ranks = OverRanks(lambda x: turns.add(rank, x), NUM_RANKS)
    return block


def run(block: Block, x: Tensor, rank: int | None, *, by_rows: bool) -> Tensor:
    """A step of N tokens from random states or pages of all heads, of which a rank has its part."""
    N, G, D = len(x), 2, WIDTHS["head_dim"]
    positions = torch.ones(N, 1, dtype=torch.int64, device=DEVICE)
    batch = Batch((1,) * N, (1,) * N, positions, None)

    def own(heads: Tensor, dim: int) -> Tensor:
        heads = heads.to(DEVICE)
        return heads if rank is None else heads.chunk(NUM_RANKS, dim)[rank].contiguous()

    generator = torch.Generator().manual_seed(3)
    if hasattr(block.self_attn, "log_decay"):
        wide = torch.promote_types(x.dtype, torch.float32)
        kv = torch.randn(N, 4, D, D, generator=generator).to(wide)
        state = LinearState(own(kv, 1))
    else:
        page = torch.arange(N, device=DEVICE)
        table = PageTable(page[:, None], page, page * 0 + 1, page * 0 + 2)
        k, v = (torch.randn(N, 16, G, D, generator=generator).to(x.dtype) for _ in range(2))
        state = PagedKV(own(k, 2), own(v, 2), table)
    if by_rows:
        return run_by_rows(block, x[:, None], batch, state)[0][:, 0]
    return block(x[:, None], batch, state)[0][:, 0]


@pytest.mark.parametrize("N", [1, 5])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_parts_sum_to_the_whole(mix: dict, N: int) -> None:
    x = torch.randn(N, 24, generator=torch.Generator().manual_seed(N)).to(DEVICE)
    turns = InTurns()
    parts = [part_of(mix, torch.float32, rank, turns) for rank in range(NUM_RANKS)]
    found = turns.run(lambda rank: run(parts[rank], x, rank, by_rows=True))
    # One sum a half: the norm over all heads takes none of its own.
    assert turns.num_sums == 2 * NUM_RANKS
    with torch.inference_mode():
        honest, exact = (
            run(block_of(mix, dtype), x.to(dtype), None, by_rows=False)
            for dtype in (torch.float32, torch.float64)
        )
    assert torch.equal(found[0], found[1])
    check_error("a divided block", found[0], honest, exact)


def test_what_stands_in_elsewhere_goes_by_its_modules() -> None:
    """A router that sends tokens to other ranks, as expert parallelism has it, sums by itself."""
    block = part_of(MIXES["lightning, experts"], torch.float32, 0, InTurns())
    block.ranks = None
    halves = stepping._halves(block, torch.zeros(1, 1, 24, device=DEVICE))
    assert halves.feed is None


def test_a_part_of_lightning_attention_is_no_whole_without_its_ranks() -> None:
    """As where tokens travel to experts: its norm and its sum are over ranks."""
    [block] = tiny_model("l", **WIDTHS).layers
    assert stepping_device.device_mix(block) is not None
    _divide_mixer(block, 0, NUM_RANKS, None)
    assert block.ranks is None
    assert stepping_device.device_mix(block) is None
