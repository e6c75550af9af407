"""Long and short chunks of one call by our kernels, where plain products stand in for libraries."""

import pytest
import torch
from kernel_device import INTERPRETED
from pages_cases import Case, make
from torch import Tensor

from sevenfold.ops import attention_chunks, attention_pages
from sevenfold.ops.attention import blocks_eager, blocks_flash, chunks_cudnn, cudnn, triton_pages
from sevenfold.ops.attention.block import Block
from sevenfold.ops.attention.chunks_plan import Cut
from sevenfold.ops.testing import check_error, poisoned_allocations

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="test_chunks_gpu.py has the libraries")
CUT = Cut(unit_tokens=8, most_tokens=16)


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What each library is asked for: its name, queries and keys."""
    seen: list[tuple[str, int, int]] = []

    def by_cudnn(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool):
        seen.append(("cudnn", len(q), len(k)))
        return blocks_eager.forward(q, k, v, Block([len(q)], [len(k)], scale, causal))

    def by_flash(q: Tensor, k: Tensor, v: Tensor, block: Block):
        seen.append(("flash", len(q), len(k)))
        return blocks_eager.forward(q, k, v, block)

    config = {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(triton_pages, "_config", lambda _call: config)
    monkeypatch.setattr(chunks_cudnn, "CUT", CUT)
    monkeypatch.setattr(cudnn, "refusal", lambda *_: None)
    monkeypatch.setattr(cudnn, "with_lse", by_cudnn)
    monkeypatch.setattr(blocks_flash, "forward", by_flash)
    monkeypatch.setattr(
        blocks_flash, "sent", lambda numbers, _: torch.tensor(numbers, dtype=torch.int32)
    )
    return seen


@pytest.mark.parametrize(
    ("lengths", "totals"),
    [((16,), (16,)), ((11,), (50,)), ((3, 9, 0, 5, 24), (20, 9, 0, 5, 61)), ((8, 2), (8, 40))],
)
def test_each_sequence_gets_its_own(
    lengths: tuple[int, ...], totals: tuple[int, ...], blocks: list[tuple[str, int, int]]
) -> None:
    x = make(Case(lengths, totals, packed=True), torch.float16)
    past = [total - length for total, length in zip(totals, lengths, strict=True)]
    how = {"lengths": lengths, "past": past, "scale": 0.3, "impl": "cudnn"}
    with poisoned_allocations():
        found = attention_chunks(x.q, x.k_pages, x.v_pages, x.pages, **how)
    honest = attention_pages(**vars(x), scale=0.3, impl="eager")
    exact = attention_pages(
        **vars(x.to(torch.device("cpu"), torch.float64)), scale=0.3, impl="reference"
    )
    check_error("o", found, honest, exact)
    sizes = {8, 16}
    assert {(q in sizes, k in sizes) for name, q, k in blocks if name == "cudnn"} == {(True, True)}
    assert all(q in sizes and k < 8 for name, q, k in blocks if name == "flash")


def test_it_needs_one_long_chunk_at_least() -> None:
    assert "lengths must have one of 8 tokens or more" in str(
        chunks_cudnn.refusal(torch.zeros(1), torch.zeros(1), [7, 3])
    )
