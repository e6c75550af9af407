"""What tests of the fused kernels share: inputs, gradients, and the error rule over all of them."""

from collections.abc import Callable, Sequence

import torch
from kernel_device import DEVICE, INTERPRETED
from torch import Tensor

from sevenfold.ops.operator import Operator
from sevenfold.ops.testing import check_error

Run = Callable[..., Tensor | tuple[Tensor, ...]]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def with_grads(run: Run, leaves: Sequence[Tensor], dys: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a function of the leaves, then the leaves' gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    ys = run(*leaves)
    ys = (ys,) if isinstance(ys, Tensor) else ys
    grads = torch.autograd.grad(ys, leaves, [dy.to(y.dtype) for y, dy in zip(ys, dys, strict=True)])
    return [*(y.detach() for y in ys), *grads]


def check_kernel(kernel: Run, eager: Run, leaves: Sequence[Tensor], dys: Sequence[Tensor]) -> None:
    """Hold a kernel's outputs and gradients to the error rule, against eager in fp64."""
    found = with_grads(kernel, leaves, dys)
    honest = with_grads(eager, leaves, dys)
    exact = with_grads(eager, [leaf.double() for leaf in leaves], dys)
    for i, three in enumerate(zip(found, honest, exact, strict=True)):
        assert three[0].dtype == three[1].dtype
        check_error(f"result {i}", *three)


def check_compiled(kernel: Run, leaves: Sequence[Tensor], dys: Sequence[Tensor]) -> None:
    """Compile a function whole, forward and backward; expect the same bits."""
    torch._dynamo.reset()
    expected = with_grads(kernel, leaves, dys)
    backend = "aot_eager" if INTERPRETED else "inductor"
    found = with_grads(torch.compile(kernel, fullgraph=True, backend=backend), leaves, dys)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def check_op(op: Operator, arguments: tuple) -> None:
    """Hold an operator to torch's rules; the costly one on a GPU only."""
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not INTERPRETED:
        utils.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op.definition, arguments, test_utils=utils)
