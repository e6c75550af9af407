"""Chunks of prompts in blocks: the plan, the sums over blocks, and the operator's rules."""

import re

import pytest
import torch
from pages_cases import Case, Inputs, make
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops import attention_chunks, attention_pages, suits_chunks
from sevenfold.ops.attention import blocks_eager, chunks_cudnn
from sevenfold.ops.attention.chunks_blocks import Chunk, Means, attend_chunk
from sevenfold.ops.attention.chunks_plan import Cut, is_round, plan_chunk
from sevenfold.ops.attention.join import join_eager
from sevenfold.ops.testing import check_error, poisoned_allocations

CPU = torch.device("cpu")
SMALL = Cut(unit_tokens=4, most_tokens=16)
EAGER = Means(blocks_eager.forward, join_eager)
# Pages of 16: borders of pages, of units, of what is gathered at a time.
LENGTHS = [(0, 4), (0, 21), (1, 4), (1, 9), (16, 16), (15, 33), (35, 7), (48, 1), (64, 3), (70, 30)]


@pytest.mark.parametrize("past", [0, 1, 3, 4, 16, 17, 31, 70])
@pytest.mark.parametrize("new", [1, 3, 4, 5, 11, 16, 23, 33, 64])
def test_a_row_meets_every_key_that_it_sees_once(past: int, new: int) -> None:
    met: dict[tuple[int, int], list[int]] = {}
    for gather in plan_chunk(past, new, SMALL):
        for rows, keys, causal in gather.pieces:
            assert gather.keys.first <= keys.first < keys.end <= gather.keys.end
            for row in range(rows.first, rows.end):
                seen = range(keys.first, past + row + 1 if causal else keys.end)
                met.setdefault((rows.first, row), []).extend(seen)
    assert {row for _, row in met} == set(range(new))
    assert all(sorted(keys) == list(range(past + row + 1)) for (_, row), keys in met.items())


def test_lengths_that_are_no_power_of_two_are_less_than_a_unit() -> None:
    shapes = set()
    for past in range(0, 200, 7):
        for new in range(4, 60, 3):
            for gather in plan_chunk(past, new, SMALL):
                assert gather.keys.num_tokens <= max(SMALL.most_tokens, new)
                for rows, keys, causal in gather.pieces:
                    assert is_round(rows.num_tokens, SMALL)
                    assert is_round(keys.num_tokens, SMALL) or keys.num_tokens < SMALL.unit_tokens
                    if is_round(keys.num_tokens, SMALL):
                        shapes.add((rows.num_tokens, keys.num_tokens, causal))
    # 4, 8 and 16 rows over 4, 8 and 16 keys; and each over its own.
    assert len(shapes) == 12


def expected(x: Inputs, case: Case) -> Tensor:
    exact = x.to(CPU, torch.float64)
    return attention_pages(**vars(exact), scale=0.3, window=case.window, impl="reference")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("past", "new"), LENGTHS)
def test_blocks_are_the_formula(past: int, new: int, dtype: torch.dtype) -> None:
    case = Case((new,), (past + new,), heads=[(4, 4), (6, 2), (3, 1)][new % 3], packed=True)
    x = make(case, dtype)
    in_fp32 = dtype if dtype != torch.float64 else torch.float32
    honest = attention_pages(**vars(x.to(CPU, in_fp32)), scale=0.3, impl="eager")
    chunk = Chunk(x.q[0], x.k_pages, x.v_pages, x.pages[0], past, 0.3)
    with poisoned_allocations():
        found = attend_chunk(chunk, SMALL, EAGER)
    assert found.dtype == dtype
    check_error("o", found[None], honest, expected(x, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
def test_the_operator_serves_several_sequences(packed: bool, dtype: torch.dtype) -> None:
    lengths = (5, 0, 20, 1) if packed else (5, 5, 5)
    totals = (5, 0, 50, 41) if packed else (5, 23, 21)
    case = Case(lengths, totals, packed=packed)
    x = make(case, dtype)
    past = [total - length for total, length in zip(totals, lengths, strict=True)]
    where = {"lengths": lengths, "past": past, "scale": 0.3}
    found = attention_chunks(x.q, x.k_pages, x.v_pages, x.pages, **where)
    honest = attention_pages(**vars(x), scale=0.3, impl="eager")
    check_error("o", found, honest, expected(x, case))


CASE = Case((5, 9), (5, 20), packed=True)
WRONG = [
    ({"q": torch.zeros(14, 4, 16)}, ValueError, "q must have 4 dimensions, got 3"),
    ({"k_pages": torch.zeros(24, 2, 16)}, ValueError, "k_pages must have 4 dimensions, got 3"),
    ({"v_pages": torch.zeros(24, 16, 2, 8)}, ValueError, "v_pages must have shape [P, page_tok"),
    ({"v_pages": torch.zeros(24, 16, 2, 16).half()}, TypeError, "v_pages must be torch.float32"),
    ({"q": torch.zeros(1, 14, 3, 16)}, ValueError, "k_pages' heads must divide the 3 query heads"),
    ({"pages": torch.zeros(2, 2)}, TypeError, "pages must be torch.int32 or torch.int64"),
    ({"lengths": (5, 8)}, ValueError, "lengths must be N = 2 numbers >= 0 that sum to B * T = 14"),
    ({"past": (0,)}, ValueError, "past must be N = 2 numbers >= 0, got [0]"),
    ({"past": (0, -1)}, ValueError, "past must be N = 2 numbers >= 0, got [0, -1]"),
    ({"past": (0, 60)}, ValueError, "pages must have room for 69 tokens, got 48"),
    ({"impl": "triton"}, UnsupportedError, "attention_chunks must use impl eager, cudnn, got"),
    ({"impl": "cudnn"}, UnsupportedError, "lengths must have one of 1024 tokens or more for impl"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_arguments(changes: dict, error: type[Exception], message: str) -> None:
    x = make(CASE, torch.float32)
    arguments = {"q": x.q, "k_pages": x.k_pages, "v_pages": x.v_pages, "pages": x.pages}
    arguments |= {"lengths": (5, 9), "past": (0, 11), "scale": 1.0} | changes
    with pytest.raises(error, match=re.escape(message)):
        attention_chunks(**arguments)


def test_cudnn_is_for_a_gpu_and_for_long_chunks() -> None:
    q, pool = torch.zeros(1, 2048, 4, 16).bfloat16(), torch.zeros(64, 64, 2, 16).bfloat16()
    pages = torch.arange(64)[None]
    rule = "q must be bf16 or fp16 on a GPU for impl cudnn, got torch.bfloat16 on cpu"
    with pytest.raises(UnsupportedError, match=re.escape(rule)):
        attention_chunks(q, pool, pool, pages, lengths=[2048], past=[0], scale=1.0, impl="cudnn")
    assert not suits_chunks(q, pool, [2048], [9000])


def test_what_of_a_gpu_cudnn_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"now": (9, 0)}
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: capability["now"])
    q = on_gpu((1, 2048, 4, 128))
    assert chunks_cudnn.refusal(q, on_gpu((8, 64, 2, 128)), [2048]) is None
    wide = on_gpu((1, 2048, 4, 256))
    assert "D and V must be one multiple of 8 up to 128" in str(
        chunks_cudnn.refusal(wide, wide, [2048])
    )
    assert "got 128 and 64" in str(chunks_cudnn.refusal(q, on_gpu((8, 64, 2, 64)), [2048]))
    capability["now"] = (8, 0)
    assert "compute capability 9.0 for impl cudnn, got 8.0" in str(
        chunks_cudnn.refusal(q, q, [2048])
    )
    assert "must have one of 1024 tokens" in str(chunks_cudnn.refusal(q, q, [1023, 5]))
    assert not suits_chunks(q, q, [2048], [9000])
    capability["now"] = (9, 0)
    assert suits_chunks(q, q, [5, 2048], [9000, 6144])
    # A chunk that is long, and one that has many keys, but none that is both.
    assert not suits_chunks(q, q, [5, 2048], [9000, 6143])


class on_gpu:  # noqa: N801
    """What a rule reads of a tensor on a GPU, where there is none."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype, self.device = shape, torch.bfloat16, torch.device("cuda")
