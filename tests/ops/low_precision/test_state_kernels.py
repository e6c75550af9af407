"""States in fewer bits by the kernels: the eager form's bits, and nothing else touched."""

import pytest
import torch
from kernel_device import DEVICE, GPU_UNLESS_INTERPRETED, INTERPRETED
from torch import Tensor

from sevenfold.ops import EncodedHeads, Noise, decode_states, encode_states

pytestmark = [
    *GPU_UNLESS_INTERPRETED,
    # NumPy's, in the interpreter.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
S, H, N = 5, 4, 3
SLOTS, INTO = [4, 0, 2], [1, 3, 0]
WIDTHS = [(40, 24)] if INTERPRETED else [(40, 24), (128, 128), (256, 256)]
FORMATS = ["fp32", "fp16", "int8"] if INTERPRETED else ["fp32", "bf16", "fp16", "int8"]
HEADS = [None, (3, 0)]


def index(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


def apart(x: Tensor, gap: int = 16) -> Tensor:
    """x with other things between its slots, as an arena holds it."""
    size = x[0].numel() + gap
    arena = torch.full((len(x) * size,), 7, dtype=x.dtype, device=x.device)
    return arena.as_strided(x.shape, (size, *x.stride()[1:])).copy_(x)


def pool(kind: str, heads: tuple[int, ...] | None, K: int, V: int) -> EncodedHeads:
    """Empty slots full of sevens."""
    h = H if heads is None else len(heads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    codes = torch.full((S, h, K, V), 7, dtype=dtype.get(kind, torch.int8), device=DEVICE)
    shapes = {"fp16": (S, h), "int8": (S, h, K)}
    scale = torch.full(shapes[kind], 7.0, device=DEVICE) if kind in shapes else None
    which = None if heads is None else index(list(heads))
    return EncodedHeads(apart(codes), None if scale is None else apart(scale), which)


def states(K: int, V: int) -> Tensor:
    """Heads of very different sizes, zeros, and numbers that round up into the next power of 2."""
    x = torch.randn(S, H, K, V, generator=torch.Generator().manual_seed(0))
    x *= 2.0 ** torch.tensor([0, 90, -100, 3])[:, None, None]
    x[2, 0] = 0
    x[0, 2, 3] = 0
    x[4, 3, 0, 0] = 1000 * (2 - 2**-12)
    x[:, 2, 1] = torch.tensor(1e-42)  # subnormal
    return apart(x.to(DEVICE))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("kind", "stochastic"), [*((kind, False) for kind in FORMATS), ("fp16", True)]
)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_it_writes_and_reads_what_the_eager_form_does(
    K: int, V: int, kind: str, heads: tuple[int, ...] | None, stochastic: bool
) -> None:
    key = torch.tensor([0, -(2**62) - 5, 2**40 + 3], device=DEVICE)
    noise = Noise(key, torch.tensor([1, 2**33 + 9, 700], device=DEVICE), 11) if stochastic else None
    found, wanted = (pool(kind, heads, K, V) for _ in range(2))
    for impl, held in (("triton", found), ("eager", wanted)):
        encode_states(states(K, V), index(SLOTS), held, index(INTO), noise=noise, impl=impl)
    assert torch.equal(found.codes, wanted.codes)
    assert found.scale is None or torch.equal(found.scale, wanted.scale)
    back = [apart(torch.full((S, H, K, V), 3.0, device=DEVICE)) for _ in range(2)]
    for impl, target in (("triton", back[0]), ("eager", back[1])):
        decode_states(wanted, index(INTO), target, index(SLOTS), impl=impl)
    assert torch.equal(*back)
    base = back[0].as_strided((S, K * V * H + 16), (K * V * H + 16, 1))
    assert bool((base[:, -16:] == 7).all())


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy's
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_what_is_no_number_stays_in_its_head_or_row(kind: str) -> None:
    x, held = states(40, 24), pool(kind, None, 40, 24)
    x[4, 1, 2, 3], x[0, 3, 5, 6] = float("nan"), float("inf")
    encode_states(x, index(SLOTS), held, index(INTO), impl="triton")
    back = torch.empty(N, H, 40, 24, device=DEVICE)
    decode_states(held, index(INTO), back, index([0, 1, 2]), impl="triton")
    bad = ~back.isfinite()
    assert bad[0, 1, 2].any()
    assert bad[1, 3, 5].any()
    row = slice(None) if kind == "fp16" else 2, slice(None) if kind == "fp16" else 5
    bad[0, 1, row[0]], bad[1, 3, row[1]] = False, False
    assert not bad.any()
