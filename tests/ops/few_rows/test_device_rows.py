"""Half a layer of a few rows by kernels, on a GPU or under Triton's interpreter."""

from collections.abc import Callable
from itertools import product
from unittest import mock

import pytest
import torch
from kernel_device import DEVICE, DTYPES, GPU_UNLESS_INTERPRETED, INTERPRETED, LOW_DTYPES
from torch import Tensor
from torch.nn import functional as F

from sevenfold import ops
from sevenfold.ops import DeviceExperts, LightningWeights, Norm, Residual, overlap
from sevenfold.ops.few_rows import device, logits_on_device, tiles, triton_experts, triton_router
from sevenfold.ops.testing import check_error, poisoned_allocations

pytestmark = [
    *GPU_UNLESS_INTERPRETED,
    pytest.mark.filterwarnings("ignore:.*has no tuning"),
    # NumPy's, in the interpreter.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered"),
]
ROWS = [1, 17, 100] if INTERPRETED else [1, 3, 17, 64, 96, 128]
# hidden_size, H, D, F: K that no step divides, N that no tile divides; on a GPU bench-2b's too.
WIDTHS = [(136, 2, 12, 136)] if INTERPRETED else [(264, 3, 40, 136), (2048, 16, 128, 1792)]
PAIRS = list(product(DTYPES, ("post", "pre")))
if INTERPRETED:  # which is slow
    PAIRS = [(DTYPES[0], "post"), (DTYPES[1], "pre"), (DTYPES[1], "post")]
POST, PRE = Residual(1.5, 0.75, post_norm=True), Residual(1.25, 1.0, post_norm=False)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def weight(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return (random(*shape, seed=seed) / shape[-1] ** 0.5).to(dtype)


def norm(width: int, seed: int, dtype: torch.dtype) -> Norm:
    return Norm((1 + 0.25 * random(width, seed=seed)).to(dtype), 1e-5)


def normed(x: Tensor, by: Norm) -> Tensor:
    """By PyTorch, in fp32 at least, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    root = (wide.square().mean(-1, keepdim=True) + by.eps).rsqrt()
    return (wide * root * by.weight.to(wide.dtype)).to(x.dtype)


def joined(stream: Tensor, f: Tensor, residual: Residual) -> Tensor:
    return torch.add(residual.beta * f, stream, alpha=residual.alpha)


def check(name: str, found: Tensor, by: Callable[[torch.dtype], Tensor]) -> None:
    """The error rule, by a function that computes in the dtype that it is given."""
    check_error(name, found, by(found.dtype), by(torch.float64))


class Lightning:
    def __init__(self, M: int, width: tuple[int, int, int], dtype: torch.dtype) -> None:
        hidden, H, D = width
        self.x, self.o = (4 * random(M, w, seed=w).to(dtype) for w in (hidden, H * D))
        self.norm, self.heads = norm(hidden, 1, dtype), (H, D)
        self.weights = LightningWeights(
            weight(3 * H * D, hidden, seed=2, dtype=dtype),
            weight(H * D, hidden, seed=3, dtype=dtype),
            norm(H * D, 4, dtype),
            weight(hidden, H * D, seed=5, dtype=dtype),
            torch.zeros(H, device=DEVICE),
        )

    def u(self, dtype: torch.dtype) -> Tensor:
        return normed(self.x.to(dtype), self.norm)

    def token(self, i: int, dtype: torch.dtype) -> Tensor:
        qkv = F.silu(self.u(dtype) @ self.weights.qkv.to(dtype).T)
        return qkv.view(len(self.x), self.heads[0], 3, -1)[:, :, i]

    def y(self, residual: Residual, dtype: torch.dtype) -> Tensor:
        u = self.u(dtype)
        gate = torch.sigmoid(u @ self.weights.gate.to(dtype).T)
        wide = torch.promote_types(dtype, torch.float32)
        o = (normed(self.o.to(wide), self.weights.norm) * gate).to(dtype)
        stream = u if residual.post_norm else self.x.to(dtype)
        return joined(stream, o @ self.weights.out.to(dtype).T, residual)


@pytest.mark.parametrize(("dtype", "placement"), PAIRS)
@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("width", [w[:3] for w in WIDTHS])
def test_lightning_keeps_to_the_error_rule(
    width: tuple[int, int, int], M: int, dtype: torch.dtype, placement: str
) -> None:
    residual = POST if placement == "post" else PRE
    case = Lightning(M, width, dtype)
    with poisoned_allocations():
        fed = ops.feed_lightning(case.x, case.norm, case.weights, residual)
        y = ops.join_lightning(case.o, fed, case.weights, residual)
    for i, name in enumerate("qkv"):
        assert fed.tokens[i].is_contiguous()
        check(name, fed.tokens[i], lambda dtype, i=i: case.token(i, dtype))
    check("y", y, lambda dtype: case.y(residual, dtype))


@pytest.mark.parametrize(("dtype", "placement"), PAIRS)
@pytest.mark.parametrize("M", ROWS[::2])
@pytest.mark.parametrize("width", [w[:3] for w in WIDTHS])
def test_softmax_keeps_to_the_error_rule(
    width: tuple[int, int, int], M: int, dtype: torch.dtype, placement: str
) -> None:
    residual = POST if placement == "post" else PRE
    case, G = Lightning(M, width, dtype), 1
    H, D = case.heads
    weights = [weight(n * D, width[0], seed=6 + n, dtype=dtype) for n in (H, G, G)]
    with poisoned_allocations():
        rows, stream = ops.feed_softmax(case.x, case.norm, weights, residual)
        y = ops.join_softmax(case.o, case.weights.out, stream, residual)
    for found, w in zip(rows, weights, strict=True):
        check("q, k, v", found, lambda dtype, w=w: case.u(dtype) @ w.to(dtype).T)

    def exact(dtype: torch.dtype) -> Tensor:
        stream = case.u(dtype) if residual.post_norm else case.x.to(dtype)
        return joined(stream, case.o.to(dtype) @ case.weights.out.to(dtype).T, residual)

    check("y", y, exact)


@pytest.mark.parametrize(("dtype", "placement"), PAIRS)
@pytest.mark.parametrize("M", ROWS[:-1])
@pytest.mark.parametrize("width", [w[:3] for w in WIDTHS])
def test_parts_of_lightning_sum_to_the_whole(
    width: tuple[int, int, int], M: int, dtype: torch.dtype, placement: str
) -> None:
    """Each rank has the whole's rows of half the channels; one sum does for norm and product."""
    residual, (hidden, H, D) = POST if placement == "post" else PRE, width
    case, sums = Lightning(M, (hidden, 2 * H, D), dtype), 0
    case.o[0] /= 1e3  # a row whose norm is near its eps
    with poisoned_allocations():
        for rank in range(2):
            w = case.weights
            own = LightningWeights(
                w.qkv.chunk(2)[rank],
                w.gate.chunk(2)[rank],
                Norm(w.norm.weight.chunk(2)[rank], w.norm.eps),
                w.out.chunk(2, 1)[rank].contiguous(),
                w.log_decay.chunk(2)[rank],
            )
            fed = ops.feed_lightning(case.x, case.norm, own, residual)
            part = ops.part_of_lightning(case.o.chunk(2, 1)[rank].contiguous(), fed, own)
            assert part.dtype is torch.float32
            sums = sums + part
        y = ops.join_part_of_lightning(sums, fed, own, residual, 2)
    check("y", y, lambda dtype: case.y(residual, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_joins_the_stream(dtype: torch.dtype) -> None:
    sums, stream = (random(3, 1100, seed=seed).to(dtype) for seed in (1, 2))
    with poisoned_allocations():
        y = ops.join_sum(sums, stream, PRE)
    check("y", y, lambda dtype: joined(stream.to(dtype), sums.to(dtype), PRE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rotated_as_by_the_model(dtype: torch.dtype) -> None:
    from sevenfold.models.layers import frequency, rotate, rotation

    M, H, G, D, r = 5, 3, 2, 12, 8
    q, k = random(M, H, D, seed=0).to(dtype), random(M, G, D, seed=1).to(dtype)
    positions = torch.tensor([[0, 1, 7, 1000, 100_000]], device=DEVICE)
    turns = rotation(positions, r, 1e4, dtype=dtype)
    exact = rotation(positions, r, 1e4, dtype=torch.float32)
    found = (q.clone(), k.clone())
    turn = frequency(r, 1e4, device=DEVICE, dtype=torch.float32)
    ops.rotate_on_device(*found, positions.flatten(), turn)
    assert exact is not None
    wide = type(exact)(*(x.double() for x in exact))
    for name, x, y in (("q", q, found[0]), ("k", k, found[1])):
        # In fp64 past the angles, which are fp32 everywhere.
        check_error(name, y, rotate(x[None], turns)[0], rotate(x[None].double(), wide)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_are_rotated_in_place(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from sevenfold.models import Batch, ModelConfig
    from sevenfold.models.mixers import SoftmaxAttention, softmax

    B, T, by_kernel = 2, 67, [True]
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    others = {"vocab_size": 5, "layer_types": ("full_attention",), "intermediate_size": 8}
    config = ModelConfig(**sizes, **others, rotary_dim=8)
    mixer = SoftmaxAttention(config, window=None).to(DEVICE).requires_grad_(False)
    batch = Batch.rows(B, T, past=(1000, 0), device=DEVICE)
    q, k = (random(B, T, heads, 12, seed=heads).to(dtype) for heads in (4, 2))
    if INTERPRETED:
        monkeypatch.setattr(softmax, "suits_device_rotation", lambda q, k: by_kernel[0])
    with torch.no_grad():
        x, y = q.clone(), k.clone()
        turned = mixer._turned(x, y, batch.positions)
        assert turned[0] is x
        assert turned[1] is y
        alone, _ = mixer._turned(k.clone(), k[:, :, :0], batch.positions)
        assert torch.equal(alone, y)
    by_kernel[0] = False
    assert not ops.suits_device_rotation(q, k)  # now that gradients are enabled
    honest = mixer._turned(q, k, batch.positions)
    exact = mixer._turned(q.double(), k.double(), batch.positions)
    for name, found, plain, wanted in zip("qk", turned, honest, exact, strict=True):
        check_error(name, found, plain, wanted)


def expert_layer(width: int, F: int, E: int, chosen: int, dtype: torch.dtype) -> DeviceExperts:
    return DeviceExperts(
        weight(E, width, seed=11, dtype=torch.float32),
        weight(E, 2 * F, width, seed=12, dtype=dtype),
        weight(E, width, F, seed=13, dtype=dtype),
        chosen,
    )


def by_choice(u: Tensor, shares: Tensor, experts: Tensor, layer: DeviceExperts) -> Tensor:
    """The experts' sum by PyTorch, in the dtype of u."""
    rows = []
    for j in range(experts.shape[1]):
        gate_up, down = (w.to(u.dtype)[experts[:, j].long()] for w in layer[1:3])
        gate, up = torch.einsum("mfk,mk->mf", gate_up, u).chunk(2, -1)
        rows.append(torch.einsum("mnf,mf->mn", down, F.silu(gate) * up))
    wide = torch.promote_types(u.dtype, torch.float32)
    return sum(r.to(wide) * shares[:, j : j + 1].to(wide) for j, r in enumerate(rows)).to(u.dtype)


# M, k, E: more and fewer choices than experts, alone and together, tiles for 16 to 128 rows.
MIXTURES = [(1, 2, 4), (1, 3, 4), (2, 1, 2), (3, 2, 8), (17, 2, 3), (100, 2, 3)]
EXPERT_WIDTHS = [(40, 24)] if INTERPRETED else [(264, 136), (2048, 1792)]
if not INTERPRETED:
    MIXTURES += [(33, 1, 1), (8, 2, 8), (64, 2, 8), (64, 8, 32), (16, 2, 32), (128, 1, 1)]
    MIXTURES += [
        (65, 4, 8),
        (96, 2, 8),
        (128, 2, 8),
        (128, 2, 64),
        (128, 8, 64),
        (128, 8, 32),
        (128, 8, 16),
    ]


@pytest.mark.parametrize("dtype", DTYPES[-1:] if INTERPRETED else DTYPES)
@pytest.mark.parametrize(("M", "chosen", "E"), MIXTURES)
@pytest.mark.parametrize(("hidden", "width"), EXPERT_WIDTHS)
def test_experts_keep_to_the_error_rule(
    hidden: int, width: int, M: int, chosen: int, E: int, dtype: torch.dtype
) -> None:
    x, by = random(M, hidden, seed=M).to(dtype), norm(hidden, 1, dtype)
    layer = expert_layer(hidden, width, E, chosen, dtype)
    with poisoned_allocations():
        choice = triton_router.choose(x, by, layer.router, chosen)
    check("u", choice.u, lambda dtype: normed(x.to(dtype), by))
    logits = ops.router_logits(choice.u, layer.router, impl="eager")
    shares, experts = ops.route(logits, chosen, impl="eager")
    assert torch.equal(choice.experts, experts.int())
    exact = ops.route(choice.u.double() @ layer.router.double().T, chosen, impl="eager")[0]
    check_error("shares", choice.weights, shares, exact)
    for residual in (POST, PRE):
        with poisoned_allocations():
            found = ops.experts_on_device(x, by, layer, residual)

        def wanted(dtype: torch.dtype, residual: Residual = residual) -> Tensor:
            rows = normed(x.to(dtype), by)
            stream = rows if residual.post_norm else x.to(dtype)
            return joined(stream, by_choice(rows, shares, experts, layer), residual)

        check("y", found, wanted)


@pytest.mark.parametrize(("dtype", "placement"), PAIRS)
@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_dense_keeps_to_the_error_rule(
    width: tuple[int, ...], M: int, dtype: torch.dtype, placement: str
) -> None:
    residual = POST if placement == "post" else PRE
    hidden, *_, wide = width
    x, by = random(M, hidden, seed=M).to(dtype), norm(hidden, 1, dtype)
    gate_up = weight(2 * wide, hidden, seed=2, dtype=dtype)
    down = weight(hidden, wide, seed=3, dtype=dtype)
    with poisoned_allocations():
        found = ops.dense_on_device(x, by, gate_up, down, residual)

    def wanted(dtype: torch.dtype) -> Tensor:
        u = normed(x.to(dtype), by)
        gate, up = (u @ gate_up.to(dtype).T).chunk(2, -1)
        f = (F.silu(gate) * up) @ down.to(dtype).T
        return joined(u if residual.post_norm else x.to(dtype), f, residual)

    check("y", found, wanted)


def test_one_row_in_parts_keeps_to_the_error_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no program holds a whole row: norms are kernels of their own, and products go on."""
    parts = {"BN": 4, "BK": 64, "WK": 1, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(tiles, "best_config", lambda *_: parts)
    dtype = torch.float32
    test_lightning_keeps_to_the_error_rule((136, 2, 12), 1, dtype, "post")
    test_softmax_keeps_to_the_error_rule((136, 2, 12), 1, dtype, "pre")
    test_experts_keep_to_the_error_rule(136, 72, 1, 3, 4, dtype)


@pytest.mark.parametrize("M", ROWS)
def test_logits_keep_to_the_error_rule(M: int) -> None:
    dtype = LOW_DTYPES[0]
    x, w = random(M, 104, seed=0).to(dtype), weight(83, 104, seed=1, dtype=dtype)
    found = logits_on_device(x, w)
    assert found.dtype is torch.float32
    check_error("z", found, x.float() @ w.float().T, x.double() @ w.double().T)


@pytest.mark.parametrize(("M", "dtype"), [(64, torch.float32), (128, LOW_DTYPES[0])])
def test_experts_with_all_rows_or_none(M: int, dtype: torch.dtype) -> None:
    """A skewed router: rows beyond a tile take another round; no expert's rows are left out."""
    E = 8
    layer = expert_layer(16, 8, E, 1, dtype)
    for busy in ([5] * M, [7] * 33 + [0] * (M - 33)):
        experts = torch.tensor(busy, dtype=torch.int32, device=DEVICE)[:, None]
        u = random(M, 16, seed=1).to(dtype)
        shares = torch.ones(M, 1, device=DEVICE)
        assert tiles.gate_up_tile(M, layer.gate_up).BM < 33
        with poisoned_allocations():
            choice = triton_router.Choice(u, experts, shares)
            found = triton_experts.feed(choice, layer.gate_up, layer.down, u, PRE)

        def wanted(dtype: torch.dtype, u: Tensor = u, experts: Tensor = experts) -> Tensor:
            wide = u.to(dtype)
            return joined(
                wide, by_choice(wide, torch.ones(M, 1, device=DEVICE), experts, layer), PRE
            )

        check("y", found, wanted)


@pytest.mark.parametrize(("M", "bad"), [(2, float("inf")), (5, float("nan"))])
def test_a_row_that_is_not_finite_stays_alone(M: int, bad: float) -> None:
    case = Lightning(M, (16, 2, 8), torch.float32)
    layer = expert_layer(16, 8, 4, 2, torch.float32)

    def run() -> list[Tensor]:
        fed = ops.feed_lightning(case.x, case.norm, case.weights, POST)
        y = ops.join_lightning(case.o, fed, case.weights, POST)
        dense = (layer.gate_up[0], layer.down[0])
        return [
            *fed.tokens,
            y,
            ops.experts_on_device(case.x, case.norm, layer, POST),
            ops.dense_on_device(case.x, case.norm, *dense, POST),
            logits_on_device(case.x, case.weights.gate),
        ]

    clean = run()
    case.x[1, 3] = bad
    for found, honest in zip(run(), clean, strict=True):
        kept = [m for m in range(M) if m != 1]
        # NumPy's products, in the interpreter, depend on a row's place.
        same = torch.isfinite if INTERPRETED else honest[kept].eq
        assert bool(same(found[kept]).all())
        assert not bool(found[1].isfinite().all())


@pytest.mark.skipif(INTERPRETED, reason="NumPy's products depend on it")
def test_a_rows_result_does_not_depend_on_its_place() -> None:
    layer = expert_layer(16, 8, 4, 2, torch.float32)
    x, by = random(24, 16, seed=0), norm(16, 1, torch.float32)
    turned = torch.arange(23, -1, -1, device=DEVICE)
    found = ops.experts_on_device(x, by, layer, POST)
    assert torch.equal(ops.experts_on_device(x[turned], by, layer, POST), found[turned])
    dense = ops.dense_on_device(x, by, layer.gate_up[0], layer.down[0], POST)
    again = ops.dense_on_device(x[turned], by, layer.gate_up[0], layer.down[0], POST)
    assert torch.equal(again, dense[turned])


def test_rows_suit_a_gpu_only_and_few_of_them() -> None:
    x = torch.ones(4, 8)
    with torch.no_grad():
        assert not device.suits_device_rows(x)
        if not INTERPRETED:
            x = x.to(DEVICE)
            assert device.suits_device_rows(x)
            assert device.suits_device_rows(x.expand(16, 4, 8))
            assert not device.suits_device_rows(x.expand(17, 4, 8))
            assert device.suits_device_rows(x.half().expand(32, 4, 8))
            assert not device.suits_device_rows(x.half().expand(33, 4, 8))
            assert not device.suits_device_rows(x.double())
            with torch.autocast("cuda", torch.bfloat16):
                assert not device.suits_device_rows(x)
    assert not device.suits_device_rows(x)
    assert device.suits_device_weights([torch.ones(3, 8)])
    assert not device.suits_device_weights([torch.ones(3, 8).half()[:, :4].contiguous()])
    assert not device.suits_device_weights([torch.ones(8, 3).t()])
    assert not device.suits_device_weights([torch.ones(33)[1:].view(4, 8)])
    assert not device.suits_device_weights([torch.ones(3, 8), torch.ones(3, 8).half()])
    assert device.suits_device_router(torch.ones(64, 8), 8)
    assert not device.suits_device_router(torch.ones(64, 8), 9)
    assert not device.suits_device_router(torch.ones(65, 8), 2)


@pytest.mark.skipif(INTERPRETED, reason="captures a graph")
@pytest.mark.parametrize("M", [1, 8, 64, 128])
def test_half_layers_are_captured_in_a_graph(M: int) -> None:
    case = Lightning(M, (256, 4, 64), torch.bfloat16)
    layer = expert_layer(256, 128, 8, 2, torch.bfloat16)

    def step() -> tuple[Tensor, ...]:
        fed = ops.feed_lightning(case.x, case.norm, case.weights, POST)
        y = ops.join_lightning(case.o, fed, case.weights, POST)
        return *fed.tokens, ops.experts_on_device(y, case.norm, layer, POST)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    case.x.copy_(random(M, 256, seed=99))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


@pytest.mark.skipif(INTERPRETED, reason="many runs")
def test_every_run_gives_the_same_bits() -> None:
    case = Lightning(9, (512, 4, 128), torch.bfloat16)
    layer = expert_layer(512, 256, 4, 2, torch.bfloat16)

    def run() -> Tensor:
        fed = ops.feed_lightning(case.x, case.norm, case.weights, POST)
        y = ops.join_lightning(case.o, fed, case.weights, POST)
        return ops.experts_on_device(y, case.norm, layer, POST)

    first = run()
    assert all(torch.equal(run(), first) for _ in range(100))


@pytest.mark.skipif(INTERPRETED, reason="launches follow one another")
@pytest.mark.parametrize("M", [1, 2, 40, 100])
def test_launches_that_overlap_give_the_bits_of_those_that_do_not(M: int) -> None:
    case = Lightning(M, (2048, 16, 128), torch.bfloat16)
    layer = expert_layer(2048, 1792, 8, 2, torch.bfloat16)
    slots, decay = torch.arange(M, device=DEVICE), torch.full((16,), -0.01, device=DEVICE)
    pool = random(M, 16, 128, 128, seed=7)

    def run() -> Tensor:
        x, states = case.x, pool.clone()
        for _ in range(6):
            fed = ops.feed_lightning(x, case.norm, case.weights, POST)
            o = ops.lightning_attention_decode(*fed.tokens, decay, states, slots)
            x = ops.join_lightning(o.flatten(1), fed, case.weights, POST)
            x = ops.experts_on_device(x, case.norm, layer, POST)
        return logits_on_device(x, case.weights.gate)

    with mock.patch.object(overlap, "_can_overlap", return_value=False):
        apart = run()
    assert torch.equal(run(), apart)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(20):
        graph.replay()
        assert torch.equal(found, apart)
