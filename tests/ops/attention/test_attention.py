"""Softmax attention: a dense statement, the reference and eager agree; the rules have messages."""

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops import attention, attention_cached
from sevenfold.ops.attention import reference
from sevenfold.ops.testing import check_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
D, V = 4, 3
SCALE = 0.5
GROUPS = [(1, 1), (4, 4), (4, 2), (6, 1)]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().to(dtype)


def inputs(B: int, T: int, H: int = 4, G: int = 2, dtype: torch.dtype = torch.float64):
    shapes = [(B, T, H, D), (B, T, G, D), (B, T, G, V)]
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def dense(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, flip: bool = False) -> Tensor:
    """softmax(scale Q K^T + mask) V of one sequence; q [Tq, H, D] are the last tokens of k, v.

    flip sums in the other direction, which shows what rounding does.
    """
    Tq, H, Tk, G = *q.shape[:2], *k.shape[:2]
    k, v = (x[:, torch.arange(H) * G // H] for x in (k, v))
    scores = SCALE * torch.einsum("qhd,khd->hqk", q, k)
    age = torch.arange(Tk - Tq, Tk)[:, None] - torch.arange(Tk)
    hidden = (age < 0) | (age >= (Tk + 1 if window is None else window))
    weights = scores.masked_fill(hidden, -torch.inf).exp()
    if flip:
        weights, v = weights.flip(-1), v.flip(0)
    return torch.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdim=True), v)


def dense_packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None, flip: bool = False
) -> Tensor:
    parts = zip(*(x.flatten(0, 1).split(list(lengths)) for x in (q, k, v)), strict=True)
    outputs = [dense(*part, window, flip) for part in parts]
    return torch.cat(outputs).view(*q.shape[:3], -1)


def with_grads(run, tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    o = run(*leaves)
    do = random(*o.shape, dtype=o.dtype, seed=7)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def check_all(tensors: list[Tensor], lengths: Sequence[int], window: int | None) -> None:
    """Outputs and gradients: dense in fp64 is exact, dense in the dtype the honest run."""
    low = tensors[0].dtype
    exact = with_grads(lambda *x: dense_packed(*x, lengths, window), [x.double() for x in tensors])
    literal, eager = (
        with_grads(
            lambda *x, impl=impl: attention(
                *x, lengths=lengths, scale=SCALE, window=window, impl=impl
            ),
            tensors,
        )
        for impl in ("reference", "eager")
    )
    honest = with_grads(lambda *x: dense_packed(*x, lengths, window), tensors)
    if low == torch.float64:
        honest[0] = dense_packed(*tensors, lengths, window, flip=True)
        del honest[1:], exact[1:], literal[1:], eager[1:]  # gradcheck tests these
    names = ("o", "dq", "dk", "dv")[: len(exact)]
    for name, *four in zip(names, eager, literal, honest, exact, strict=True):
        assert four[0].dtype == four[1].dtype == low
        check_error(f"eager {name}", four[0], four[2], four[3])
        check_error(f"reference {name}", four[1], four[2], four[3])


def test_a_hand_worked_output() -> None:
    q = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    k = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    v = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    for impl in ("reference", "eager"):
        o = attention(q, k, v, lengths=[2], scale=1.0, impl=impl).flatten().tolist()
        # The second token: (3 + 5 e^2) / (1 + e^2).
        assert [f"{x:.5f}" for x in o] == ["3.00000", "4.76159"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "G"), GROUPS)
def test_whole_rows(H: int, G: int, dtype: torch.dtype) -> None:
    check_all(inputs(2, 9, H, G, dtype), (9, 9), None)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("window", [1, 2, 4, 9, 10, 50])
@pytest.mark.parametrize("lengths", [(9, 9), (18,), (1, 0, 12, 5)])
def test_windows(lengths: tuple[int, ...], window: int, dtype: torch.dtype) -> None:
    B = 2 if lengths == (9, 9) else 1
    check_all(inputs(B, 18 // B, dtype=dtype), lengths, window)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("lengths", [(0, 7), (7, 0), (3, 0, 0, 4), (1, 1, 5), (1,) * 7])
def test_packed_lengths(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    check_all(inputs(1, 7, dtype=dtype), lengths, None)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_gradcheck(window: int | None, impl: str) -> None:
    options = {"lengths": (2, 0, 5), "scale": SCALE, "window": window, "impl": impl}
    leaves = [x.requires_grad_() for x in inputs(1, 7, H=2, G=1)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **options), leaves, fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("window", [None, 3])
def test_a_document_never_sees_another(window: int | None, impl: str) -> None:
    lengths = (4, 1, 5)
    tensors = inputs(1, 10)
    options = {"lengths": lengths, "scale": SCALE, "window": window, "impl": impl}
    before = attention(*tensors, **options)
    for x in tensors:
        x[:, 4:5] = torch.nan
    after = attention(*tensors, **options)
    same = [torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)]
    assert same == [True] * 4 + [False] + [True] * 5


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize(("B", "T", "lengths"), [(2, 0, (0, 0)), (1, 0, (0,))])
def test_no_tokens(B: int, T: int, lengths: tuple[int, ...], impl: str) -> None:
    o = attention(*inputs(B, T), lengths=lengths, scale=SCALE, impl=impl)
    assert torch.equal(o, torch.zeros(B, T, 4, V, dtype=o.dtype))


CACHED = [
    ((1, 1, 1), (5, 5, 5)),
    ((1, 1, 1), (5, 1, 8)),
    ((3, 3, 3), (8, 8, 8)),
    ((3, 3, 3), (3, 8, 5)),
    ((0, 4, 5), (0, 4, 7)),
    ((2, 0, 1), (8, 6, 1)),
    ((0, 0, 0), (3, 0, 8)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize(("lengths", "keys"), CACHED)
def test_cached(
    lengths: tuple[int, ...], keys: tuple[int, ...], window: int | None, dtype: torch.dtype
) -> None:
    new, _, _ = inputs(1, sum(lengths), dtype=dtype)
    _, k, v = inputs(3, 8, dtype=dtype)
    for n, filled in enumerate(keys):
        k[n, filled:], v[n, filled:] = 1e3, 1e3  # places that no one may read

    def statement(q: Tensor, k: Tensor, v: Tensor, flip: bool = False) -> Tensor:
        parts = zip(q[0].split(list(lengths)), k, v, keys, strict=True)
        return torch.cat([dense(q, k[:n], v[:n], window, flip) for q, k, v, n in parts])[None]

    honest = statement(new, k, v, flip=True)
    exact = statement(new.double(), k.double(), v.double())
    for impl in ("reference", "eager"):
        options = {"lengths": lengths, "key_lengths": keys, "window": window, "impl": impl}
        o = attention_cached(new, k, v, scale=SCALE, **options)
        assert o.dtype == dtype
        check_error(impl, o, honest, exact)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_unfilled_places_are_not_read(impl: str) -> None:
    (q, _, _), (_, k, v) = inputs(2, 1), inputs(2, 8)
    options = {"lengths": (1, 1), "key_lengths": (3, 3), "scale": SCALE, "impl": impl}
    before = attention_cached(q, k, v, **options)
    k[:, 3:], v[:, 3:] = torch.nan, torch.nan
    assert torch.equal(attention_cached(q, k, v, **options), before)


def test_rows_of_new_tokens_may_be_a_batch_or_packed() -> None:
    (q, _, _), (_, k, v) = inputs(3, 2), inputs(3, 8)
    options = {"lengths": (2, 2, 2), "key_lengths": (4, 8, 2), "scale": SCALE}
    rows = attention_cached(q, k, v, **options)
    packed = attention_cached(q.flatten(0, 1)[None], k, v, **options)
    assert torch.equal(rows.flatten(0, 1), packed[0])


@pytest.mark.parametrize("op", ["attention", "attention_cached"])
def test_a_named_impl_is_the_one_that_runs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(1, 3)
    keys = {"key_lengths": (3,)} if op == "attention_cached" else {}
    run = {"attention": attention, "attention_cached": attention_cached}[op]
    expected = run(*tensors, lengths=(3,), scale=SCALE, impl="eager", **keys)
    monkeypatch.setattr(reference, "one_sequence", None)
    assert torch.equal(run(*tensors, lengths=(3,), scale=SCALE, **keys), expected)
    with pytest.raises(TypeError, match="not callable"):
        run(*tensors, lengths=(3,), scale=SCALE, impl="reference", **keys)
    known = "reference, eager, numba" + (", flash" if op == "attention" else "")
    with pytest.raises(UnsupportedError, match=f"{op} must use impl {known}, got 'onednn'"):
        run(*tensors, lengths=(3,), scale=SCALE, impl="onednn", **keys)
    with pytest.raises(ValueError, match=r"impl must be one of .*, got 'fast'"):
        run(*tensors, lengths=(3,), scale=SCALE, impl="fast", **keys)


Q, K_, V_ = inputs(2, 3)
META = torch.device("meta")


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (ValueError, {"q": Q[0]}, "q and k must have 4 dimensions, got 3 and 4"),
        (ValueError, {"k": K_[..., :2]}, "k must have shape [..., G, D] = [2, 3, 2, 4], got [2, 3"),
        (ValueError, {"k": K_[:, :2]}, "v must have shape [..., G, V] = [2, 2, 2, 3], got [2, 3,"),
        (ValueError, {"k": K_[:, :2], "v": V_[:, :2]}, "k must have shape [B, T, G, D] = [2, 3, 2"),
        (ValueError, {"v": V_[:, :, :1]}, "v must have shape [..., G, V] = [2, 3, 2, 3], got"),
        (ValueError, {"k": K_.to(META)}, "k must lie on cpu, got meta"),
        (ValueError, {"v": V_.to(META)}, "v must lie on cpu, got meta"),
        (
            ValueError,
            {"k": random(2, 3, 3, D), "v": random(2, 3, 3, V)},
            "k's heads must divide the 4 query heads, got 3",
        ),
        (
            ValueError,
            {"k": random(2, 3, 0, D), "v": random(2, 3, 0, V)},
            "k's heads must divide the 4 query heads, got 0",
        ),
        (TypeError, {"k": K_.float()}, "k must be torch.float64, got torch.float32"),
        (TypeError, {"v": V_.half()}, "v must be torch.float64, got torch.float16"),
        (ValueError, {"lengths": (3, 2)}, "lengths must be >= 0 and sum to B * T = 6, got (3, 2)"),
        (ValueError, {"lengths": (7, -1)}, "lengths must be >= 0 and sum to B * T = 6, got (7, -"),
        (ValueError, {"lengths": ()}, "lengths must be >= 0 and sum to B * T = 6, got ()"),
        (ValueError, {"window": 0}, "window must be at least 1, got 0"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_wrong_arguments(error: type[Exception], changes: dict, message: str) -> None:
    arguments = {"q": Q, "k": K_, "v": V_, "lengths": (3, 3), "scale": SCALE} | changes
    with pytest.raises(error, match=re.escape(message)):
        attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_lengths": (3,)}, "key_lengths must be as many as lengths and N = 2, got (3,)"),
        ({"lengths": (6,), "key_lengths": (6,)}, "key_lengths must be as many as lengths and N"),
        ({"key_lengths": (3, 2)}, "key_lengths must lie in 3 (new) to 3 (places), got 2"),
        ({"key_lengths": (4, 3)}, "key_lengths must lie in 3 (new) to 3 (places), got 4"),
        ({"window": -1}, "window must be at least 1, got -1"),
    ],
)
def test_wrong_cached_arguments(changes: dict, message: str) -> None:
    arguments = {"lengths": (3, 3), "key_lengths": (3, 3), "scale": SCALE} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_cached(Q, K_, V_, **arguments)


def test_flash_says_what_it_needs() -> None:
    q, k, v = inputs(1, 8, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="q must be bf16 or fp16 on a GPU for impl flash"):
        attention(q, k, v, lengths=(3, 5), scale=SCALE, impl="flash")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("H", "G"), GROUPS)
def test_packed_sequences_in_one_call_on_a_gpu(H: int, G: int, window: int | None) -> None:
    lengths, T, width = (1, 30, 0, 97, 2), 130, 16
    shapes = [(1, T, heads, width) for heads in (H, G, G, H)]
    exact = [random(*shape, seed=i) for i, shape in enumerate(shapes)]

    def run(dtype: torch.dtype, impl: str) -> list[Tensor]:
        q, k, v = (x.to("cuda", dtype).requires_grad_() for x in exact[:3])
        o = attention(q, k, v, lengths=lengths, scale=SCALE, window=window, impl=impl)
        return [o, *torch.autograd.grad(o, (q, k, v), exact[3].to("cuda", dtype))]

    truth, eager = run(torch.float64, "reference"), run(torch.bfloat16, "eager")
    packed, names = run(torch.bfloat16, "flash"), ("o", "dq", "dk", "dv")
    for name, *found in zip(names, packed, eager, truth, strict=True):
        check_error(name, *(x.detach() for x in found))
