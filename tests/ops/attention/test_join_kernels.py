"""The kernel that joins two parts by their log-sum-exps, on a GPU or under the interpreter."""

import pytest
import torch
from kernel_device import DEVICE, DTYPES, GPU_UNLESS_INTERPRETED

from sevenfold.ops.attention.join import Part, join_eager
from sevenfold.ops.attention.triton_join import join
from sevenfold.ops.testing import check_error

pytestmark = GPU_UNLESS_INTERPRETED


def parts(T: int, H: int, D: int, dtype: torch.dtype) -> tuple[Part, Part]:
    """Of both signs of the difference of log-sum-exps, some so large that one part vanishes."""
    random = torch.Generator().manual_seed(T)
    some, more = (torch.randn(T, H, D, generator=random).to(dtype) for _ in range(2))
    lse, gap = (torch.randn(H, T, generator=random) * size for size in (40.0, 8.0))
    gap[:, ::5] *= 100
    return Part(some.to(DEVICE), lse.to(DEVICE)), Part(more.to(DEVICE), (lse + gap).to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", ["same", "fp32", "in place", "rows of a larger one"])
@pytest.mark.parametrize(("T", "H", "D"), [(70, 3, 24), (33, 1, 128)])
def test_two_parts_become_one(T: int, H: int, D: int, to: str, dtype: torch.dtype) -> None:
    some, more = parts(T, H, D, dtype)
    room = {
        "same": torch.empty_like(some.o),
        "fp32": torch.empty_like(some.o, dtype=torch.float32),
        "in place": some.o,
        "rows of a larger one": some.o.new_empty(T + 4, H, D)[3 : T + 3],
    }[to]
    exact = join_eager(
        Part(some.o.double(), some.lse.double()), Part(more.o.double(), more.lse.double()),
        torch.empty_like(some.o, dtype=torch.float64),
    )  # fmt: skip
    honest = join_eager(some, more, torch.empty_like(room))
    found = join(some, more, room)
    assert found.o is room
    check_error("o", found.o, honest.o, exact.o)
    check_error("lse", found.lse, honest.lse, exact.lse)


def test_parts_of_any_strides() -> None:
    """As libraries give them: heads before tokens."""
    some, more = parts(40, 3, 16, torch.float32)
    exact = join_eager(
        Part(some.o.double(), some.lse.double()), Part(more.o.double(), more.lse.double()),
        torch.empty_like(some.o, dtype=torch.float64),
    )  # fmt: skip
    honest = join_eager(some, more, torch.empty_like(some.o))
    heads_first = Part(more.o.transpose(0, 1).contiguous().transpose(0, 1), more.lse)
    check_error("o", join(some, heads_first, torch.empty_like(some.o)).o, honest.o, exact.o)
