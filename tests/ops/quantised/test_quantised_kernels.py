"""Products with 8-bit weights: the kernels, on a GPU or under Triton's interpreter."""

# A quantised weight is handed on as two arguments.
# pyright: reportCallIssue=false

from collections.abc import Callable

import pytest
import torch
from kernel_device import DEVICE, GPU_UNLESS_INTERPRETED, INTERPRETED
from kernel_device import LOW_DTYPES as DTYPES
from torch import Tensor

from sevenfold.ops import (
    Dispatch,
    Fp8Rows,
    fp8_linear,
    int8_linear,
    int8_mixture,
    mixture,
    plan_dispatch,
    quantise_rows,
    quantise_rows_fp8,
)
from sevenfold.ops.quantised import rule, triton_linear, triton_mixture, triton_widen
from sevenfold.ops.swiglu import swiglu
from sevenfold.ops.testing import check_error, poisoned_allocations

pytestmark = [
    *GPU_UNLESS_INTERPRETED,
    pytest.mark.filterwarnings("ignore:.*has no tuning"),
    # NumPy's, in the interpreter.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
KERNELS = {"int8": triton_linear.int8_linear, "fp8": triton_linear.fp8_linear}
OPERATORS = {"int8": int8_linear, "fp8": fp8_linear}
QUANTISE = {"int8": quantise_rows, "fp8": quantise_rows_fp8}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact_product(kind: str, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """fp64, of the numbers that codes and scales stand for."""
    wide = x.double()
    if kind == "fp8":
        rounded = quantise_rows_fp8(x)
        wide = rounded.codes.double() * rounded.scale.double()[:, None]
    return wide @ (codes.double() * scale.double()[:, None]).T


# Rows at the edges of the rule's buckets, K that no step divides, N that no tile divides.
SHAPES = [(1, 40, 48), (16, 33, 640), (17, 16, 96), (40, 70, 80), (64, 24, 544), (70, 130, 64)]
if not INTERPRETED:
    SHAPES += [(1, 6144, 2048), (64, 2048, 6144), (130, 2048, 1792), (700, 1024, 512)]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_linear_keeps_to_the_error_rule(
    M: int, N: int, K: int, dtype: torch.dtype, kind: str
) -> None:
    x, held = random(M, K, seed=0).to(dtype), QUANTISE[kind](random(N, K, seed=1))
    with poisoned_allocations():
        found = KERNELS[kind](x, *held)
    eager = OPERATORS[kind](x, *held, impl="eager")
    check_error("y", found, eager, exact_product(kind, x, *held))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_row_that_is_not_finite_stays_alone(kind: str) -> None:
    x, held = random(5, 64, seed=0).to(DTYPES[0]), QUANTISE[kind](random(20, 64, seed=1))
    clean = KERNELS[kind](x, *held)
    x[1, 3], x[4, 0] = float("nan"), float("inf")
    found = KERNELS[kind](x, *held)
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])
    assert bool((~found[[1, 4]].isfinite()).all())


def test_rows_are_rounded_to_fp8_as_the_eager_form_does() -> None:
    peaks = torch.logspace(-30, 30, 9, base=2.0)[:, None].to(DEVICE)
    x = torch.cat([peaks * random(9, 1500, seed=2), torch.zeros(1, 1500, device=DEVICE)])
    # Ties, the least numbers, and what rounds up into the next power of two.
    x[0, :8] = torch.tensor([448.0, 447, 17, 19, 2**-9, 2**-10, 3 * 2**-10, 15.75])
    codes, scale = triton_widen.rounded_to_fp8(x, torch.float32)
    wanted = quantise_rows_fp8(x)
    assert torch.equal(codes, wanted.codes.float())
    assert torch.equal(scale, wanted.scale)
    x[2, 7], x[3, 1] = float("nan"), float("-inf")
    codes, scale = triton_widen.rounded_to_fp8(x, torch.float32)
    assert bool((codes * scale[:, None])[2:4].isnan().any(1).all())
    assert torch.equal(codes[4:], wanted.codes.float()[4:])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_weight_is_widened_as_it_reads(kind: str) -> None:
    codes, scale = QUANTISE[kind](random(3, 5, 1100, seed=3))
    wide = triton_widen.widened(codes, scale, torch.float16)
    assert torch.equal(wide, (codes.float() * scale[..., None]).half())


def test_many_rows_go_over_a_widened_weight() -> None:
    """And give what fewer rows give, within the error rule."""
    x, held = random(513, 32, seed=0).to(DTYPES[0]), quantise_rows(random(20, 32, seed=1))
    assert rule.product_path(len(x)) == "scratch"
    found = triton_linear.int8_linear(x, *held)
    assert torch.equal(found, int8_linear(x, *held, impl="eager"))
    check_error("y", triton_linear.int8_linear(x[:9], *held), found[:9],
                exact_product("int8", x[:9], *held))  # fmt: skip


class Mixture:
    """A mixture's arguments, and its kernels called as the operators call them."""

    def __init__(self, kind: str, sizes: tuple[int, int, int], D: int, width: int) -> None:
        T, k, E = sizes
        self.kind = kind
        self.x, self.weights = random(T, D, seed=0).to(DTYPES[0]), random(T, k, seed=1).abs()
        skewed = random(T, E, seed=2) - torch.linspace(0, 2, E, device=DEVICE)
        self.dispatch = plan_dispatch(skewed.topk(k, dim=1).indices, E, None)
        self.gate_up = QUANTISE[kind](random(E, 2 * width, D, seed=3) / D**0.5)
        self.down = QUANTISE[kind](random(E, D, width, seed=4) / width**0.5)

    def by_kernels(self) -> Tensor:
        run = triton_mixture.int8_mixture if self.kind == "int8" else triton_mixture.fp8_mixture
        plan = self.dispatch
        rest = (plan.choice, plan.row, plan.rows_per_expert)
        return run(self.x, self.weights, *self.gate_up, *self.down, *rest)

    def exact(self) -> Tensor:
        """fp64 of the dequantised experts."""
        plain = [codes.double() * scale.double()[..., None]
                 for codes, scale in (self.gate_up, self.down)]  # fmt: skip
        x, weights = self.x.double(), self.weights.double()
        return mixture(x, weights, *plain, self.dispatch, impl="eager")


# T, k, E, D, F: tiles of 16, 32, 64 and 128 rows; experts without rows; odd widths.
MIXTURES = [
    (1, 2, 4, 32, 24),
    (9, 2, 5, 40, 16),
    (13, 2, 2, 16, 24),
    (20, 2, 2, 24, 16),
    (34, 1, 1, 16, 40),
]
if not INTERPRETED:
    MIXTURES += [(1, 2, 8, 2048, 1792), (64, 2, 8, 2048, 1792), (600, 2, 32, 512, 256)]


@pytest.mark.parametrize(("T", "k", "E", "D", "width"), MIXTURES)
def test_int8_mixture_keeps_to_the_error_rule(T: int, k: int, E: int, D: int, width: int) -> None:
    case = Mixture("int8", (T, min(k, E), E), D, width)
    with poisoned_allocations():
        found = case.by_kernels()
    eager = int8_mixture(case.x, case.weights, case.gate_up, case.down, case.dispatch, impl="eager")
    check_error("y", found, eager, case.exact())


def rounded(x: Tensor) -> Tensor:
    codes, scale = quantise_rows_fp8(x)
    return codes.to(x.dtype) * scale.to(x.dtype)[:, None]


@pytest.mark.parametrize(("T", "k", "E", "D", "width"), MIXTURES)
def test_fp8_products_of_a_mixture_keep_to_the_error_rule(
    T: int, k: int, E: int, D: int, width: int
) -> None:
    """Each product by itself: fp8 turns the last bit of a hidden row into a sixteenth of it."""
    case = Mixture("fp8", (T, min(k, E), E), D, width)
    plan = triton_mixture.Plan(
        case.dispatch.choice, case.dispatch.row, case.dispatch.rows_per_expert
    )
    first, second = rule.expert_tiles(len(plan.choice), E, DEVICE)
    tokens = triton_widen.rounded_to_fp8(case.x, case.x.dtype)
    hidden = triton_mixture.gate_up_rows(*tokens, *case.gate_up, plan, first)
    rows = case.x[case.dispatch.token]
    check_experts("hidden", hidden, rows, case.gate_up, case.dispatch, swiglu)
    again = triton_widen.rounded_to_fp8(hidden, hidden.dtype)
    out = triton_mixture.down_rows(*again, *case.down, plan, second)
    check_experts("out", out, hidden, case.down, case.dispatch, lambda y: y)
    total = (case.weights[..., None] * out[case.dispatch.row].float()).sum(1).to(out.dtype)
    exact = (case.weights.double()[..., None] * out[case.dispatch.row].double()).sum(1)
    check_error("y", case.by_kernels(), total, exact)


def check_experts(
    name: str, found: Tensor, x: Tensor, held: Fp8Rows, dispatch: Dispatch, then: Callable
) -> None:
    """One expert's rows after another, by fp8_linear's eager form and in fp64."""
    start = 0
    for e, count in enumerate(dispatch.rows_per_expert.tolist()):
        rows, part = x[start : start + count], found[start : start + count]
        if count:
            eager = then(fp8_linear(rows, held.codes[e], held.scale[e], impl="eager"))
            exact = exact_product("fp8", rows, held.codes[e], held.scale[e])
            check_error(name, part, eager, then(exact))
        start += count


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_expert_that_is_not_finite_hurts_its_own_tokens_alone(kind: str) -> None:
    case = Mixture(kind, (9, 1, 5), 32, 24)
    clean = case.by_kernels()
    expert = int(case.dispatch.rows_per_expert.argmax())
    case.down.scale[expert, 3] = float("nan")
    found, ends = case.by_kernels(), case.dispatch.rows_per_expert.cumsum(0).tolist()
    hurt = torch.zeros(9, dtype=torch.bool, device=DEVICE)
    hurt[
        case.dispatch.token[
            ends[expert] - int(case.dispatch.rows_per_expert[expert]) : ends[expert]
        ]
    ] = True
    assert torch.equal(found[:, 3].isnan(), hurt)
    assert torch.equal(found[~hurt], clean[~hurt])


def test_every_run_gives_the_same_bits() -> None:
    x, held = random(5, 640, seed=0).to(DTYPES[0]), quantise_rows(random(33, 640, seed=1))
    first, case = triton_linear.int8_linear(x, *held), Mixture("int8", (9, 2, 5), 32, 24)
    second = case.by_kernels()
    for _ in range(1 if INTERPRETED else 100):
        assert torch.equal(triton_linear.int8_linear(x, *held), first)
        assert torch.equal(case.by_kernels(), second)


@pytest.mark.skipif(INTERPRETED, reason="captures a graph")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_products_are_captured_in_a_graph(kind: str) -> None:
    case, held = Mixture(kind, (16, 2, 8), 256, 128), QUANTISE[kind](random(512, 256, seed=7))
    run = OPERATORS[kind]

    def step() -> tuple[Tensor, Tensor]:
        return run(case.x, *held), case.by_kernels()

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    case.x.copy_(random(16, 256, seed=9))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU's product")
def test_scaled_mm_keeps_to_the_error_rule() -> None:
    x, held = random(200, 512, seed=0).bfloat16(), quantise_rows_fp8(random(384, 512, seed=1))
    found = fp8_linear(x, *held)
    assert torch.equal(found, fp8_linear(x, *held, impl="scaled_mm"))
    eager = fp8_linear(x, *held, impl="eager")
    check_error("y", found, eager, exact_product("fp8", x, *held))
