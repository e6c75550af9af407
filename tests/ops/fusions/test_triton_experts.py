"""The experts' kernels: routing, the counting sort, rows out and back, the whole mixture."""

from typing import Any

import pytest
import torch
from kernel_device import DEVICE, DTYPES, GPU_UNLESS_INTERPRETED, INTERPRETED
from kernel_statements import check_compiled, check_kernel, check_op, random, with_grads
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sevenfold.ops import Impl
from sevenfold.ops.experts import (
    Dispatch,
    default_router_impl,
    dispatch_eager,
    gather_parts,
    route_and_count,
    router_logits,
    triton_dispatch,
    triton_grouped_swiglu,
    triton_mixture,
    triton_parts,
    triton_route,
    triton_router,
    triton_rows,
)
from sevenfold.ops.testing import check_error, poisoned_allocations

pytestmark = GPU_UNLESS_INTERPRETED
# The mixture's products take bf16 on a GPU; the interpreter has no bf16.
MIXTURE_DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
CASES = [
    (9, 2, 5, None),
    (9, 2, 5, 3),
    (1, 1, 1, None),
    (40, 3, 4, 7),
    (7, 8, 8, 1),
    (0, 2, 3, None),
]
if not INTERPRETED:
    CASES += [(5000, 2, 8, None), (5000, 2, 8, 1100), (3000, 8, 256, None), (3001, 4, 100, 60)]
each_case = pytest.mark.parametrize(("T", "k", "E", "capacity"), CASES)


def choices(T: int, k: int, E: int) -> Tensor:
    """Distinct experts of each token, the first ones more often."""
    generator = torch.Generator().manual_seed(T)
    skewed = torch.rand(T, E, generator=generator) - torch.linspace(0, 0.5, E)
    return skewed.topk(k, dim=1).indices.to(DEVICE)


def planned(T: int, k: int, E: int, capacity: int | None) -> Dispatch:
    return Dispatch(*triton_dispatch.plan_dispatch(choices(T, k, E), E, capacity))


@each_case
def test_the_sort_is_the_eager_one(T: int, k: int, E: int, capacity: int | None) -> None:
    experts = choices(T, k, E)
    choice, row, rows_per_expert = dispatch_eager.plan(experts, E, capacity)
    plan = planned(T, k, E, capacity)
    R = len(choice)
    assert len(plan.choice) == triton_dispatch.max_rows(T * k, E, capacity) >= R
    assert torch.equal(plan.choice[:R], choice)
    assert not plan.choice[R:].any()
    assert torch.equal(plan.rows_per_expert, rows_per_expert)
    assert torch.equal(torch.where(plan.row == len(plan.choice), R, plan.row), row)


def eager_rows(x: Tensor, plan: Dispatch) -> Tensor:
    """[R, D] by an index, zeros where a row belongs to nobody."""
    used = torch.arange(len(plan.choice), device=DEVICE) < plan.rows_per_expert.sum()
    return torch.where(used[:, None], x[plan.token], 0)


def eager_combine(rows: Tensor, weights: Tensor, row: Tensor) -> Tensor:
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return (padded[row] * weights[..., None]).sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@each_case
def test_rows_out_and_back(
    T: int, k: int, E: int, capacity: int | None, dtype: torch.dtype
) -> None:
    plan, D = planned(T, k, E, capacity), 24
    R = len(plan.choice)
    x, rows = random(T, D, dtype=dtype), random(R, D, dtype=dtype, seed=1)
    weights, dy = random(T, k, dtype=dtype, seed=2), random(T, D, dtype=dtype, seed=3)
    check_kernel(
        lambda x: triton_rows.gather_rows(x, plan.row, R, False),
        lambda x: eager_rows(x, plan),
        [x],
        [rows],
    )
    check_kernel(
        lambda rows, weights: triton_rows.combine(rows, weights, plan.row),
        lambda rows, weights: eager_combine(rows, weights, plan.row),
        [rows, weights],
        [dy],
    )


PARTED = [(9, 2, 5, (5, 6, 7)), (9, 2, 5, (0, 18, 0)), (9, 2, 5, (4, 0, 10)), (0, 2, 3, (0, 0, 0))]
if not INTERPRETED:
    PARTED += [(5000, 2, 8, (2501, 2500, 4999)), (3000, 8, 256, (17, 1, 23_000))]


@pytest.mark.parametrize(("T", "k", "E", "sizes"), PARTED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_out_and_back(
    T: int, k: int, E: int, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Also of a plan that lacks some choices, whose rows are all somebody's."""
    order, row, rows_per_expert = dispatch_eager.plan(choices(T, k, E), E, None)
    R, D = sum(sizes), 24
    plan = Dispatch(order[:R], row.clamp(max=R), rows_per_expert, is_full=True)
    x, dy = random(T, D, dtype=dtype), random(T, D, dtype=dtype, seed=3)
    parts = list(random(R, D, dtype=dtype, seed=1).split(sizes))
    weights = random(T, k, dtype=dtype, seed=2)

    def gathered(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            rows = triton_rows.gather_rows(x, plan.row, R, True)
        return gather_parts(x, rows, plan, sizes)

    def eager_sum(parts: list[Tensor]) -> Tensor:
        return dispatch_eager.sum_rows(torch.cat(parts), plan.row)

    with poisoned_allocations():
        check_kernel(
            lambda *leaves: triton_parts.combine_parts(*leaves, plan.row),
            lambda *leaves: eager_combine(torch.cat(leaves[:3]), leaves[3], plan.row),
            [*parts, weights],
            [dy],
        )
        found, exact = triton_parts.sum_parts(*parts, plan.row), [part.double() for part in parts]
        check_error("sum", found, eager_sum(parts), eager_sum(exact))
        if not INTERPRETED:
            check_kernel(gathered, lambda x: x[plan.token].split(sizes), [x], parts)


@pytest.mark.parametrize(
    ("T", "E", "k"), [(9, 5, 2), (1, 1, 1), (40, 8, 8), (0, 4, 2), (33, 64, 6)]
)
def test_routing_keeps_to_the_error_rule(T: int, E: int, k: int) -> None:
    logits = 3 * random(T, E)

    def eager(logits: Tensor) -> Tensor:
        probabilities = logits.softmax(-1).topk(k, dim=-1).values
        return probabilities / probabilities.sum(-1, keepdim=True)

    check_kernel(lambda x: triton_route.route(x, k)[0], eager, [logits], [random(T, k, seed=1)])
    assert torch.equal(triton_route.route(logits, k)[1], logits.topk(k, dim=-1).indices)


COUNTED = [(9, 5, 3), (1, 1, 1), (40, 6, 6), (300, 8, 2)]
if not INTERPRETED:
    COUNTED += [(5000, 8, 2), (3001, 100, 4)]


@pytest.mark.parametrize(("T", "E", "k"), COUNTED)
def test_totals_keep_to_the_error_rule(T: int, E: int, k: int) -> None:
    """What is chosen and what is summed in one pass, and both gradients in another."""
    logits = 3 * random(T, E)

    def totals_of(run):
        def taken(logits: Tensor) -> tuple[Tensor, Tensor]:
            weights, _, totals = run(logits)
            return weights, totals.sum(0)

        return taken

    dys = [random(T, k, seed=1), random(2 * E + 1, seed=2)]
    kernel = totals_of(lambda x: triton_route.route_and_count(x, k))
    eager = totals_of(lambda x: route_and_count(x, k, impl=Impl.EAGER))
    check_kernel(kernel, eager, [logits], dys)
    _, experts, totals = triton_route.route_and_count(logits, k)
    assert torch.equal(experts, logits.topk(k, dim=-1).indices)
    chosen = totals.sum(0)[E : 2 * E]
    assert torch.equal(chosen, torch.bincount(experts.flatten(), minlength=E).float())


def test_each_part_of_the_totals_has_a_gradient_of_its_own() -> None:
    """Parts are summed as autograd pleases: rows of a gradient need not be one row."""
    T, E, k = 300, 8, 2
    logits, tokens = 3 * random(T, E), triton_route._tile(E)[0]
    dtotals = random(-(-T // tokens), 2 * E + 1, seed=2)
    assert len(dtotals) > 1

    def by_parts(logits: Tensor) -> Tensor:
        parts = [route_and_count(x, k, impl=Impl.EAGER)[2] for x in logits.split(tokens)]
        return torch.cat(parts)

    check_kernel(lambda x: triton_route.route_and_count(x, k)[2], by_parts, [logits], [dtotals])


@pytest.mark.parametrize(("E", "parts"), [(64, 3), (100, 1)])
def test_totals_of_many_experts_are_summed_at_once(E: int, parts: int) -> None:
    """Their parts would be larger than the logits, and a layer keeps them."""
    logits = 3 * random(40, E)
    totals = triton_route.in_few_parts(*triton_route.route_and_count(logits, 2))[2]
    assert totals.shape == (parts, 2 * E + 1)
    assert totals.sum(0)[E : 2 * E].sum() == 80


def test_a_gradient_of_the_weights_alone() -> None:
    logits, dy = [3 * random(40, 8)], [random(40, 2, seed=1)]
    counted = with_grads(lambda x: triton_route.route_and_count(x, 2)[0], logits, dy)
    plain = with_grads(lambda x: triton_route.route(x, 2)[0], logits, dy)
    assert all(map(torch.equal, counted, plain))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter
def test_logits_that_are_not_finite_show_in_the_totals() -> None:
    logits = random(40, 8)
    logits[7, 3] = float("nan")
    totals = triton_route.route_and_count(logits, 2)[2].sum(0)
    assert totals[:8].isnan().all()
    assert totals[-1].isnan()


class Names(TorchDispatchMode):
    """Names of the operators that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_layer_counts_without_an_operation_of_its_own() -> None:
    """Beside the choice itself; each layer's own statistics took 448 in a forward of 16 layers."""
    logits = random(40, 8).requires_grad_()
    with Names() as forward:
        weights, _, totals = triton_route.route_and_count(logits, 2)
    with Names() as backward:
        torch.autograd.grad((weights, totals), logits, (weights.detach(), totals.detach()))
    assert [n for n in forward.names if "detach" not in n] == ["sevenfold.route_and_count.default"]
    assert [n for n in backward.names if "detach" not in n] == [
        "sevenfold.route_and_count_backward.default"
    ]


def test_torch_accepts_the_counting_router() -> None:
    check_op(triton_route.route_and_count, (random(40, 8).requires_grad_(), 2))


ROUTERS = [(9, 5, 6), (1, 1, 16), (70, 8, 24)]
if not INTERPRETED:
    ROUTERS += [(4099, 8, 2048), (1000, 32, 6144), (300, 64, 1024)]


@pytest.mark.skipif(INTERPRETED, reason="an fp32 number is not the sum of three fp16 numbers")
@pytest.mark.parametrize(("T", "E", "D"), ROUTERS)
def test_router_is_as_accurate_as_fp32(T: int, E: int, D: int) -> None:
    x, weight = random(T, D, dtype=torch.bfloat16), random(E, D, seed=1) / D**0.5

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) @ weight.to(wide).T

    check_kernel(triton_router.router_logits, eager, [x, weight], [random(T, E, seed=2)])


@pytest.mark.parametrize(("T", "E", "D"), ROUTERS)
def test_router_in_exact_numbers(T: int, E: int, D: int) -> None:
    """Integers and halves, whose products and sums no precision rounds."""
    low = torch.float16 if INTERPRETED else torch.bfloat16
    x, weight = (random(n, D, seed=i).mul(2).round() / 2 for i, n in enumerate((T, E)))
    dlogits = random(T, E, seed=2).round()
    found = with_grads(triton_router.router_logits, [x.to(low), weight], [dlogits])
    exact = with_grads(lambda x, w: x @ w.T, [x.double(), weight.double()], [dlogits])
    assert torch.equal(found[0].double(), exact[0])
    assert torch.equal(found[1], exact[1].to(low))
    assert torch.equal(found[2].double(), exact[2])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 is broken")
def test_a_router_in_bf16_counts_as_the_same_numbers_in_fp32() -> None:
    x, weight = random(70, 24, dtype=torch.bfloat16), random(8, 24, seed=1, dtype=torch.bfloat16)
    wide = router_logits(x, weight.float(), impl=Impl.TRITON)
    assert torch.equal(router_logits(x, weight, impl=Impl.TRITON), wide)
    assert default_router_impl(x, weight) is Impl.TRITON


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter
def test_routing_of_nan_stays_among_the_experts() -> None:
    logits = torch.full((3, 5), float("nan"), device=DEVICE)
    _, experts = triton_route.route(logits, 3)
    assert bool(((experts >= 0) & (experts < 5)).all())


def mixture_inputs(T: int, k: int, E: int, D: int, width: int) -> list[Tensor]:
    """x, weights, gate_up_proj, down_proj."""
    shapes = [(T, D), (T, k), (E, 2 * width, D), (E, D, width)]
    x, weights, gate_up, down = (random(*shape, seed=i) for i, shape in enumerate(shapes))
    return [x, weights.abs(), gate_up / D**0.5, down / width**0.5]


def by_kernel(plan: Dispatch):
    rest = (plan.choice, plan.row, plan.rows_per_expert)
    return lambda *leaves: triton_mixture.mixture(*leaves, *rest)[0]


def by_tokens(experts: Tensor, plan: Dispatch):
    """The mixture as its formula reads: every token through every expert, then the kept choices."""

    def run(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = torch.einsum("td,efd->tef", x, gate_up).chunk(2, -1)
        outs = torch.einsum("tef,edf->ted", F.silu(gate) * up, down)
        kept = torch.where(plan.row < len(plan.choice), weights.to(x.dtype), 0)
        chosen = outs.gather(1, experts[..., None].expand(-1, -1, x.shape[1]))
        return (chosen * kept[..., None]).sum(1)

    return run


MIXTURES = [(9, 2, 5, 3, 16, 8), (12, 1, 3, None, 8, 24), (6, 2, 4, 1, 24, 16)]
if not INTERPRETED:
    MIXTURES += [(700, 2, 8, None, 256, 192), (513, 4, 16, 90, 136, 72), (300, 2, 64, 5, 128, 320)]


@pytest.mark.parametrize(("T", "k", "E", "capacity", "D", "width"), MIXTURES)
def test_mixture_keeps_to_the_error_rule(
    T: int, k: int, E: int, capacity: int | None, D: int, width: int
) -> None:
    plan = planned(T, k, E, capacity)
    x, weights, *projections = mixture_inputs(T, k, E, D, width)
    x, projections = x.to(MIXTURE_DTYPE), [p.to(MIXTURE_DTYPE) for p in projections]
    run = by_tokens(choices(T, k, E), plan)
    dy = random(T, D, dtype=MIXTURE_DTYPE, seed=9)
    check_kernel(by_kernel(plan), run, [x, weights, *projections], [dy])


def by_expert(rows_per_expert: list[int]):
    """Sorted rows as the formula reads: each expert's through its matrices."""

    def run(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        parts = []
        for rows, first, second in zip(x.split(rows_per_expert), gate_up, down, strict=True):
            gate, up = (rows @ first.mT).chunk(2, -1)
            parts.append(F.silu(gate) * up @ second.mT)
        return torch.cat(parts)

    return run


SORTED = [([3, 0, 5, 1], 16, 8), ([0, 4, 0], 8, 24)]
if not INTERPRETED:
    SORTED += [([300, 0, 129, 270], 256, 192), ([1] * 64, 128, 320)]


@pytest.mark.parametrize(("rows_per_expert", "D", "width"), SORTED)
def test_sorted_rows_keep_to_the_error_rule(rows_per_expert: list[int], D: int, width: int) -> None:
    R, E = sum(rows_per_expert), len(rows_per_expert)
    x, _, *projections = mixture_inputs(R, 1, E, D, width)
    x, projections = x.to(MIXTURE_DTYPE), [p.to(MIXTURE_DTYPE) for p in projections]
    ends = torch.tensor(rows_per_expert, device=DEVICE).cumsum(0, dtype=torch.int32)

    def kernel(*leaves: Tensor) -> Tensor:
        return triton_grouped_swiglu.grouped_swiglu(*leaves, ends)[0]

    dy = random(R, D, dtype=MIXTURE_DTYPE, seed=9)
    check_kernel(kernel, by_expert(rows_per_expert), [x, *projections], [dy])
    grads = with_grads(kernel, [x, *projections], [dy])[2:]
    for grad in grads:
        assert [bool(expert.any()) for expert in grad] == [n > 0 for n in rows_per_expert]


def test_an_expert_that_nobody_chose_gets_a_zero_gradient() -> None:
    leaves = [leaf.to(MIXTURE_DTYPE) for leaf in mixture_inputs(6, 1, 4, 16, 8)]
    experts = torch.tensor([[1], [3], [1], [1], [3], [1]], device=DEVICE)
    plan = Dispatch(*triton_dispatch.plan_dispatch(experts, 4, None))
    grads = with_grads(by_kernel(plan), leaves, [random(6, 16, seed=9)])[3:]
    for grad in grads:
        assert [bool(expert.any()) for expert in grad] == [False, True, False, True]


def test_what_nobody_owns_is_never_read_and_every_run_gives_the_same_bits() -> None:
    plan = planned(9, 2, 5, 3)
    leaves = [leaf.to(MIXTURE_DTYPE) for leaf in mixture_inputs(9, 2, 5, 16, 8)]
    dy = [random(9, 16, seed=9)]
    first = with_grads(by_kernel(plan), leaves, dy)
    with poisoned_allocations():
        second = with_grads(by_kernel(plan), leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="captures a graph")
@pytest.mark.parametrize("capacity", [None, 140])
def test_routing_and_mixture_are_captured_in_a_graph(capacity: int | None) -> None:
    logits = random(400, 8)
    x, _, gate_up, down = (t.to(MIXTURE_DTYPE) for t in mixture_inputs(400, 2, 8, 128, 64))

    def step() -> Tensor:
        weights, experts = triton_route.route(logits, 2)
        plan = Dispatch(*triton_dispatch.plan_dispatch(experts, 8, capacity))
        return by_kernel(plan)(x, weights, gate_up, down)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert torch.equal(found, expected)
    logits.copy_(random(400, 8, seed=5))
    graph.replay()
    assert torch.equal(found, step())


@pytest.mark.skipif(INTERPRETED, reason="slow: test_triton_activations compiles there")
@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore::DeprecationWarning")  # Inductor's
def test_compiles_whole() -> None:
    leaves = [leaf.to(MIXTURE_DTYPE) for leaf in mixture_inputs(30, 2, 8, 16, 24)]

    def run(router: Tensor, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        weights, experts = triton_route.route(triton_router.router_logits(x, router), 2)
        plan = triton_dispatch.plan_dispatch(experts, 8, 9)
        return triton_mixture.mixture(x, weights, gate_up, down, *plan)[0]

    check_compiled(run, [random(8, 16), leaves[0], *leaves[2:]], [random(30, 16, seed=9)])


# torch 2.11's own check reads the gradient of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck() -> None:
    experts, plan = choices(9, 2, 5), planned(9, 2, 5, 3)
    rest = (plan.choice, plan.row, plan.rows_per_expert)
    leaves = [leaf.to(MIXTURE_DTYPE).requires_grad_() for leaf in mixture_inputs(9, 2, 5, 16, 8)]
    check_op(triton_dispatch.plan_dispatch, (experts, 5, 3))
    check_op(triton_rows.gather_rows, (leaves[0], plan.row, len(plan.choice), False))
    check_op(triton_rows.combine, (random(15, 4).requires_grad_(), leaves[1].float(), plan.row))
    # Gradients of rows that are nobody's are not written: here each is a choice's.
    parts = [random(n, 4, seed=n).requires_grad_() for n in (5, 6, 7)]
    row = torch.randperm(18, generator=torch.Generator().manual_seed(0)).to(plan.row).view(9, 2)
    check_op(triton_parts.sum_parts, (*(part.detach() for part in parts), row))
    check_op(triton_parts.combine_parts, (*parts, leaves[1].float(), row))
    check_op(triton_router.router_logits, (leaves[0], random(5, 16).requires_grad_()))
    check_op(triton_route.route, (random(9, 5).requires_grad_(), 2))
    # Dropless: what lies behind the last expert's rows is not written.
    plan = planned(9, 2, 5, None)
    rest = (plan.choice, plan.row, plan.rows_per_expert)
    check_op(triton_mixture.mixture, (*leaves, *rest))
