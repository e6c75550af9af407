"""Products into memory that is there, by MKL and by tiles."""

import pytest
import torch

from sevenfold.ops.linear import mkl, products
from sevenfold.ops.testing import check_error


@pytest.mark.parametrize("fastest", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_both_keep_the_error_rule(
    fastest: bool, keep: bool, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mkl, "FASTEST", fastest)
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*s, generator=generator) for s in ((70, 90), (45, 90), (70, 60)))
    a = a.t().contiguous().t() if turned else a
    out, weight = c.clone(), b.requires_grad_()
    right = products.prepare(weight)
    found = products.add_matmul_nt(out[:, :45], a, right, keep=keep)
    assert found.data_ptr() == out.data_ptr()
    assert not found.requires_grad
    before = c[:, :45] if keep else torch.zeros(70, 45)
    exact = before.double() + a.double() @ b.detach().double().t()
    check_error("product", out[:, :45], before + a @ b.detach().t(), exact)
    assert torch.equal(out[:, 45:], c[:, 45:])


@pytest.mark.parametrize(
    ("names", "expected"),
    [("vendor_id\t: GenuineIntel\n", True), ("vendor_id\t: AuthenticAMD\n", False), (None, False)],
)
def test_who_made_the_processor(
    names: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    path = tmp_path / "cpuinfo"
    if names is not None:
        path.write_text(names)
    monkeypatch.setattr(mkl, "_CPUINFO", path)
    monkeypatch.setattr(mkl.platform, "processor", lambda: "")
    assert mkl._by_intel() is expected
