"""The scan kernels against fp64, forward and backward: on a GPU, or tiny under the interpreter."""

from collections.abc import Sequence

import pytest
import torch
from decode_cases import gaps, spread
from kernel_device import DEVICE, DTYPES, INTERPRETED
from lightning_statements import DECAYS, Inputs, borders, make_inputs
from torch import Tensor

from sevenfold.ops.lightning import Stop, eager, segments, triton_launch, triton_op
from sevenfold.ops.testing import check_error, poisoned_allocations

pytestmark = [pytest.mark.filterwarnings("ignore:lightning_scan has no tuning")]
if not INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

NAMES = ("o", "final_state", "dq", "dk", "dv", "dinitial_state")
LOW = DTYPES[-1]
if INTERPRETED:
    WIDTHS = SHAPES = [(16, 24)]
    TOKENS, RATES = [33], [(-0.917, 0.0)]
    LENGTHS = [(0, 1, 33, 0, 2)]
    CUT_RATES, CUT_DTYPES, CUT_TOKENS, PIECE_TOKENS = [(-0.3, -5e-5)], [torch.float32], 150, 32
else:
    # 64 x 64 and its neighbours: a known compiler hazard of gradients on Hopper.
    WIDTHS = [(64, 64), (96, 96), (72, 40), (128, 64), (64, 128), (128, 128)]
    # Value tiles, halves of keys, both; and widths that only the kernel for any GPU takes.
    WIDTHS += [(96, 256), (40, 136), (256, 48), (136, 200), (192, 192), (256, 256), (250, 130)]
    SHAPES = [(128, 128), (256, 192)]
    TOKENS, RATES = [1, 63, 64, 65, 500], list(DECAYS)
    LENGTHS = [(0, 1, 64, 0, 65, 2, 0), (1, 700, 3000)]
    CUT_RATES, CUT_DTYPES = ["first", "middle", "last", "mixed"], DTYPES[:2]
    CUT_TOKENS, PIECE_TOKENS = 9000, 1024
K, V = SHAPES[0]
MIXED = (-0.917, -5e-5) if INTERPRETED else "mixed"


def to_device(x: Inputs) -> Inputs:
    return Inputs(*(y.to(DEVICE) for y in x))


def scan(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, x: Inputs, scale: float, lengths):
    cu_seqlens = None if lengths is None else borders(lengths)
    return triton_op.lightning_scan(q, k, v, x.log_decay, scale, state, cu_seqlens, True)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, x: Inputs, scale: float, lengths
):
    lengths = (q.shape[1],) * q.shape[0] if lengths is None else tuple(lengths)
    options = {"scale": scale, "initial_state": state, "lengths": lengths}
    return eager.forward(q, k, v, x.log_decay, **options)


def results(op, x: Inputs, scale: float, lengths: Sequence[int] | None) -> list[Tensor]:
    """o, final_state and the gradients of q, k, v and initial_state."""
    leaves = x.leaves()
    outputs = op(*leaves, x, scale, lengths)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def check_all(x: Inputs, scale: float = 1.0, lengths: Sequence[int] | None = None) -> None:
    """Every result keeps to the error rule; a state in the dtype of the products that it sums."""
    x = to_device(x)
    with poisoned_allocations():
        found = results(scan, x, scale, lengths)
    honest = results(chunked, x, scale, lengths)
    exact = results(chunked, x.to(torch.float64), scale, lengths)
    for name, *three in zip(NAMES, found, honest, exact, strict=True):
        assert three[0].dtype == three[1].dtype
        check_error(name, three[0], three[1].to(x.q.dtype), three[2])


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut a sequence of CUT_TOKENS into several segments, and those into pieces."""
    monkeypatch.setattr(segments, "MIN_SEGMENT_TOKENS", 2 * PIECE_TOKENS)
    monkeypatch.setattr(segments, "MIN_PIECE_TOKENS", PIECE_TOKENS)
    monkeypatch.setattr(triton_launch, "num_sms", lambda _device: 64)
    segments.plan_segments.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", RATES)
@pytest.mark.parametrize(("K", "V"), SHAPES)
def test_every_decay(K: int, V: int, decay: str | tuple[float, ...], dtype: torch.dtype) -> None:
    check_all(make_inputs(decay, 40 if INTERPRETED else 500, K=K, V=V, dtype=dtype), 0.7)


@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES[:2])
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_widths_and_tokens(K: int, V: int, T: int, dtype: torch.dtype) -> None:
    check_all(make_inputs(MIXED, T, B=2, K=K, V=V, dtype=dtype), -0.5)


@pytest.mark.parametrize("dtype", [LOW] if INTERPRETED else DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("K", "V"), SHAPES)
def test_packed_documents(K: int, V: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make_inputs(MIXED, sum(lengths), N=len(lengths), K=K, V=V, dtype=dtype)
    check_all(x, 1.0, lengths)


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("dtype", CUT_DTYPES)
@pytest.mark.parametrize("decay", CUT_RATES)
@pytest.mark.parametrize(("K", "V"), SHAPES)
def test_sequences_that_are_cut_into_segments(
    K: int, V: int, decay: str | tuple[float, ...], dtype: torch.dtype
) -> None:
    lengths = (7, CUT_TOKENS, 0, 40)
    x = make_inputs(decay, sum(lengths), N=4, K=K, V=V, dtype=dtype)
    q, k, v, _state = to_device(x).leaves()
    whole = triton_launch.Scan(q, k, v, x.log_decay, 1.0, lengths)
    assert triton_launch.plan_scan(whole).num_slots > 1
    check_all(x, 0.5, lengths)


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize(("K", "V"), SHAPES)
def test_states_that_are_kept_on_the_way(K: int, V: int) -> None:
    lengths = (CUT_TOKENS, 0, 40)
    marks = [(0, 1), (0, CUT_TOKENS), (0, 110), (2, 33), (0, 2 * PIECE_TOKENS)]
    stops = [Stop(n, tokens, 7 - i) for i, (n, tokens) in enumerate(marks)]
    x = to_device(make_inputs(MIXED, sum(lengths), N=3, K=K, V=V, dtype=LOW))
    pool = spread(torch.full((8, x.q.shape[2], K, V), 7.0, device=DEVICE))
    numbers = [number for stop in stops for number in stop]
    arguments = (x.log_decay, 0.5, x.initial_state, borders(lengths))
    o, final = triton_op.lightning_scan_keep(*x[:3], *arguments, pool, numbers)
    plain = scan(*x[:3], x.initial_state, x, 0.5, lengths)
    honest = chunked(*x[:3], x.initial_state, x, 0.5, lengths)
    exact = chunked(*x.to(torch.float64)[:3], x.initial_state.double(), x, 0.5, lengths)
    check_error("o", o, honest[0], exact[0])
    check_error("final_state", final, honest[1].to(LOW), exact[1])
    assert final.shape == plain[1].shape
    first = [0, CUT_TOKENS, CUT_TOKENS]
    for n, tokens, slot in stops:
        part = slice(first[n], first[n] + tokens)
        state = x.initial_state[n : n + 1]
        own = [y[:, part] for y in x[:3]]
        honest_state = chunked(*own, state, x, 0.5, None)[1]
        exact_state = chunked(*(y.double() for y in own), state.double(), x, 0.5, None)[1]
        check_error(f"{n} {tokens}", pool[slot : slot + 1], honest_state.to(LOW), exact_state)
    assert bool((pool[:3] == 7).all())
    assert bool((gaps(pool) == 7).all())


def test_no_initial_state_means_zeros() -> None:
    x = to_device(make_inputs(MIXED, 70, B=2, K=K, V=V, dtype=LOW))
    none = scan(*x[:3], None, x, 1.0, None)
    zeros = scan(*x[:3], torch.zeros_like(x.initial_state), x, 1.0, None)
    assert all(torch.equal(a, b) for a, b in zip(none, zeros, strict=True))


@pytest.mark.parametrize(("K", "V"), SHAPES)
def test_any_layout_gives_the_same_bits(K: int, V: int) -> None:
    x = to_device(make_inputs(MIXED, 70, B=2, K=K, V=V, dtype=DTYPES[0 if INTERPRETED else -1]))
    plain = scan(*x[:3], x.initial_state, x, 1.0, None)
    joined = torch.cat([x.q, x.k, x.v], dim=-1)  # one projection, as a model hands it over
    views = joined.split([K, K, V], dim=-1)
    heads_first = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in x[:3]]
    odd = [torch.cat([y[..., :1], y], dim=-1)[..., 1:] for y in x[:3]]
    for tokens in (views, heads_first, odd):
        again = scan(*tokens, x.initial_state, x, 1.0, None)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_final_state_is_written_when_asked_for_only() -> None:
    x = to_device(make_inputs(MIXED, 70, B=2, K=K, V=V, dtype=DTYPES[0]))
    o, none = triton_op.lightning_scan(*x[:3], x.log_decay, 1.0, x.initial_state, None, False)
    assert torch.equal(o, scan(*x[:3], x.initial_state, x, 1.0, None)[0])
    assert len(none) == 0


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_rows_or_no_tokens(shape: tuple[int, int]) -> None:
    B, T = shape
    x = to_device(make_inputs(MIXED, T, B=B, K=K, V=V, dtype=LOW))
    o, final = scan(*x[:3], x.initial_state, x, 1.0, None)
    assert o.shape == x.v.shape
    assert torch.equal(final, x.initial_state)


def operator_arguments() -> tuple:
    x = to_device(make_inputs(MIXED, 70, N=3, K=K, V=V, dtype=DTYPES[0]))
    leaves = x.leaves()
    return (*leaves[:3], x.log_decay, 0.5, leaves[3], borders([20, 30, 20]), True)


def test_torch_accepts_the_operator() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    definition = triton_op.lightning_scan.definition
    torch.library.opcheck(definition, operator_arguments(), test_utils=tests)


def test_compiled_in_one_graph_forward_and_backward() -> None:
    arguments = operator_arguments()
    leaves = [arguments[i] for i in (0, 1, 2, 5)]

    def gradients(op) -> tuple[Tensor, ...]:
        o, final = op(*arguments)
        return torch.autograd.grad(o.square().sum() + final.sum(), leaves)

    torch.compiler.reset()
    backend = "aot_eager" if INTERPRETED else "inductor"
    compiled = torch.compile(triton_op.lightning_scan, fullgraph=True, backend=backend)
    for a, b in zip(gradients(compiled), gradients(triton_op.lightning_scan), strict=True):
        assert torch.equal(a, b)
