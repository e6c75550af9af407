"""Direct launches on a GPU: the bits of Triton's own, whatever the arguments' kinds."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sevenfold.ops import lightning_attention
from sevenfold.ops.lightning.triton_hopper import hopper_scan_kernel
from sevenfold.ops.rms_norm import triton_rms_norm
from sevenfold.ops.rms_norm.triton_rms_norm import normed
from sevenfold.ops.triton_launched import Launched

pytestmark = pytest.mark.gpu
KERNEL = triton_rms_norm._forward_kernel
EPS = 1e-6


def rows(T: int, D: int, dtype: torch.dtype, offset: int) -> Tensor:
    """[T, D] that begins a number of elements behind a 16-byte border."""
    generator = torch.Generator("cuda").manual_seed(T * D)
    memory = torch.randn(T * D + offset, generator=generator, device="cuda").to(dtype)
    return memory[offset:].view(T, D)


CASES = [
    (T, D, dtype, offset)
    for T in (1, 3, 16)
    for D in (16, 33, 64, 2048)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for offset in (0, 1)
]


def test_the_same_bits_as_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [rows(*case) for case in CASES]
    weights = [torch.rand(x.shape[1], device="cuda") for x in inputs]
    # Nothing is known yet at each: Triton launches all of them.
    expected = []
    for x, weight in zip(inputs, weights, strict=True):
        monkeypatch.setattr(KERNEL, "_compiled", {})
        expected.append(normed(x, None, weight, EPS))
    monkeypatch.setattr(KERNEL, "_compiled", {})
    for _ in range(2):
        found = [normed(x, None, w, EPS) for x, w in zip(inputs, weights, strict=True)]
        assert all(map(torch.equal, found, expected))
    assert len(KERNEL._compiled) > 12


def test_the_scan_gives_the_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    assert isinstance(hopper_scan_kernel, Launched)
    monkeypatch.setattr(hopper_scan_kernel, "_compiled", {})
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(3, 2, 300, 4, 72, generator=generator, device="cuda").bfloat16()
    log_decay = torch.tensor([0.0, -0.01, -0.1, -1.0], device="cuda")
    borders = torch.tensor([0, 100, 300], dtype=torch.int32)

    def run(at: int, packed: bool) -> list[Tensor]:
        """Forward and backward of tokens that lie on a 16-byte border, or beside one and copied."""
        leaves = [t[..., at : at + 64].detach().requires_grad_() for t in x]
        q, k, v = (t[:1] if packed else t for t in leaves)
        o = lightning_attention(q, k, v, log_decay, cu_seqlens=borders if packed else None).o
        return [o.detach(), *torch.autograd.grad(o.float().sum(), leaves)]

    cases = [(at, packed) for at in (0, 1) for packed in (False, True)]
    first = [run(*case) for case in cases]
    assert hopper_scan_kernel._compiled
    for case, expected in zip(cases, first, strict=True):
        assert all(map(torch.equal, run(*case), expected))
    again = dict(hopper_scan_kernel._compiled)
    run(*cases[0])
    assert hopper_scan_kernel._compiled == again
