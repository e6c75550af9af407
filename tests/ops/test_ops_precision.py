"""Where autocast applies, and where it does not."""

import pytest
import torch

from sevenfold.ops import autocast, full_precision

CPU = torch.device("cpu")


def test_autocast_off_changes_nothing() -> None:
    tensors = (torch.ones(2), torch.ones(2).half())
    assert all(a is b for a, b in zip(autocast(*tensors), tensors, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_fp32_alone(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 1 / 3])
    with torch.autocast("cpu", dtype):
        single, double, half = autocast(x, x.double(), x.half())
    assert torch.equal(single, x.to(dtype))
    assert torch.equal(double, x.double())
    assert torch.equal(half, x.half())


def test_full_precision_holds_inside_autocast_only_there() -> None:
    x = torch.tensor([[1 / 3, 1 / 7]])
    exact = x @ x.mT
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision(CPU):
            inside = x @ x.mT
        after = x @ x.mT
    assert torch.equal(inside, exact)
    assert after.dtype == torch.bfloat16
