"""Every rule of the arguments, with its message."""

import re

import pytest
import torch
from lightning_statements import make_inputs

from sevenfold.config import UnsupportedError
from sevenfold.ops import Impl, lightning_attention, lightning_attention_step

B, T, H, K, V = 2, 3, 4, 5, 6


def tokens(width: int = K, dtype: torch.dtype = torch.float32, **sizes: int) -> torch.Tensor:
    shape = {"B": B, "T": T, "H": H} | sizes
    return torch.zeros(*shape.values(), width, dtype=dtype)


def packed(borders: object, dtype: torch.dtype = torch.int32) -> dict:
    one_row = {"q": tokens(B=1), "k": tokens(B=1), "v": tokens(V, B=1)}
    return one_row | {"cu_seqlens": torch.tensor(borders, dtype=dtype)}


META = torch.device("meta")
STATE = torch.zeros(B, H, K, V)
BF16 = {
    "q": tokens(dtype=torch.bfloat16),
    "k": tokens(dtype=torch.bfloat16),
    "v": tokens(V, dtype=torch.bfloat16),
}
WRONG_VALUES = [
    ({"q": tokens()[0]}, "q must have shape [B, T, H, K], got [3, 4, 5]"),
    ({"k": tokens(6)}, "k must have shape [B, T, H, K] = [2, 3, 4, 5], got [2, 3, 4, 6]"),
    ({"k": tokens()[0]}, "k must have shape [B, T, H, K] = [2, 3, 4, 5], got [3, 4, 5]"),
    ({"v": tokens(V)[0]}, "v must have shape [B, T, H, V], got [3, 4, 6]"),
    ({"v": tokens(V, H=1)}, "v must have shape [B, T, H, V] = [2, 3, 4, 6], got [2, 3, 1, 6]"),
    ({"log_decay": torch.zeros(3)}, "log_decay must have shape [H] = [4], got [3]"),
    ({"log_decay": torch.full((H,), 0.5)}, "log_decay must be <= 0, got 0.5"),
    ({"log_decay": torch.full((H,), torch.nan)}, "log_decay must be <= 0, got nan"),
    (
        {"log_decay": torch.zeros(H, requires_grad=True)},
        "log_decay must be fixed, got a tensor that requires a gradient",
    ),
    ({"k": tokens().to(META)}, "k must lie on cpu, got meta"),
    ({"v": tokens(V).to(META)}, "v must lie on cpu, got meta"),
    ({"log_decay": torch.zeros(H, device=META)}, "log_decay must lie on cpu, got meta"),
    (
        {"initial_state": torch.zeros(1, H, K, V)},
        "initial_state must have shape [N, H, K, V] = [2, 4, 5, 6], got [1, 4, 5, 6]",
    ),
    ({"initial_state": STATE.to(META)}, "initial_state must lie on cpu, got meta"),
    (
        {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)},
        "cu_seqlens needs a packed batch: B must be 1, got 2",
    ),
    (packed([1, 3]), "cu_seqlens must run from 0 to T = 3, got [1, 3]"),
    (packed([0, 2]), "cu_seqlens must run from 0 to T = 3, got [0, 2]"),
    (packed([0]), "cu_seqlens must run from 0 to T = 3, got [0]"),
    (packed([]), "cu_seqlens must run from 0 to T = 3, got []"),
    (packed([0, 2, 1, 3]), "cu_seqlens must never fall, got [0, 2, 1, 3]"),
    (
        packed([0, 1, 3]) | {"initial_state": torch.zeros(1, H, K, V)},
        "initial_state must have shape [N, H, K, V] = [2, 4, 5, 6], got [1, 4, 5, 6]",
    ),
    (
        {"impl": "fast"},
        f"impl must be one of {', '.join(Impl)}, got 'fast'",
    ),
]
WRONG_TYPES = [
    (
        {"q": tokens(dtype=torch.int64)},
        "q must be torch.bfloat16 or torch.float16 or torch.float32 or torch.float64, "
        "got torch.int64",
    ),
    ({"k": tokens(dtype=torch.bfloat16)}, "k must be torch.float32, got torch.bfloat16"),
    ({"v": tokens(V, dtype=torch.float64)}, "v must be torch.float32, got torch.float64"),
    (
        {"log_decay": torch.zeros(H, dtype=torch.float64)},
        "log_decay must be torch.float32, got torch.float64",
    ),
    (
        BF16 | {"initial_state": STATE.bfloat16()},
        "initial_state must be torch.float32, got torch.bfloat16",
    ),
    ({"initial_state": STATE.double()}, "initial_state must be torch.float32, got torch.float64"),
    (packed([0, 3], torch.int64), "cu_seqlens must be torch.int32, got torch.int64"),
]


def call(changes: dict):
    arguments = {"q": tokens(), "k": tokens(), "v": tokens(V), "log_decay": torch.zeros(H)}
    return lightning_attention(**(arguments | changes))


@pytest.mark.parametrize(("changes", "message"), WRONG_VALUES, ids=lambda x: str(x)[:60])
def test_wrong_value(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(changes)


@pytest.mark.parametrize(("changes", "message"), WRONG_TYPES, ids=lambda x: str(x)[:60])
def test_wrong_dtype(changes: dict, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call(changes)


@pytest.mark.parametrize("borders", [3, [[0], [3]]])
def test_borders_of_another_rank(borders: object) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to T = 3"):
        call(packed(borders))


@pytest.mark.parametrize("impl", ["onednn", "grouped_mm"])
def test_an_impl_of_other_operators_is_refused(impl: str) -> None:
    message = f"lightning_attention must use impl reference, eager, numba, triton, got '{impl}'"
    with pytest.raises(UnsupportedError, match=message):
        call({"impl": impl})


def step(changes: dict):
    arguments = {
        "q": torch.zeros(B, H, K),
        "k": torch.zeros(B, H, K),
        "v": torch.zeros(B, H, V),
        "log_decay": torch.zeros(H),
        "state": STATE,
    }
    return lightning_attention_step(**(arguments | changes))


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (ValueError, {"q": tokens()}, "q must have shape [B, H, K], got [2, 3, 4, 5]"),
        (ValueError, {"k": torch.zeros(B, H, 1)}, "k must have shape"),
        (ValueError, {"v": torch.zeros(B, 1, V)}, "v must have shape"),
        (ValueError, {"log_decay": torch.zeros(H + 1)}, "log_decay must have shape [H] = [4], got"),
        (TypeError, {"log_decay": torch.zeros(H).double()}, "log_decay must be torch.float32, got"),
        (ValueError, {"state": STATE[:1]}, "state must have shape [N, H, K, V] = [2, 4, 5, 6]"),
        (ValueError, {"state": STATE.to(META)}, "state must lie on cpu, got meta"),
        (TypeError, {"state": STATE.bfloat16()}, "state must be torch.float32"),
        (TypeError, {"v": torch.zeros(B, H, V).half()}, "v must be torch.float32"),
        (ValueError, {"impl": "fast"}, "impl must be one of"),
        (UnsupportedError, {"impl": "onednn"}, "lightning_attention_step must use impl"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_wrong_step(error: type[Exception], changes: dict, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        step(changes)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_a_named_impl_is_the_one_that_runs(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args, **_options):
        raise RuntimeError(impl)

    monkeypatch.setattr(f"sevenfold.ops.lightning.{impl}.forward", fail)
    monkeypatch.setattr(f"sevenfold.ops.lightning.{impl}.step", fail)
    with pytest.raises(RuntimeError, match=impl):
        call({"impl": impl})
    with pytest.raises(RuntimeError, match=impl):
        step({"impl": impl})
    other = {"reference": "eager", "eager": "reference"}[impl]
    assert not call({"impl": other}).o.any()
    assert not step({"impl": other}).o.any()


def test_none_means_eager() -> None:
    x = make_inputs("mixed", 70, dtype=torch.float32)
    default, eager = (lightning_attention(*x[:4], impl=impl).o for impl in (None, "eager"))
    reference = lightning_attention(*x[:4], impl="reference").o
    assert torch.equal(default, eager)
    assert not torch.equal(default, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_dtypes_of_the_result(impl: str, dtype: torch.dtype) -> None:
    x = make_inputs("mixed", 5, dtype=dtype)
    o, state = lightning_attention(*x[:4], return_final_state=True, impl=impl)
    assert (o.dtype, state.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    first = lightning_attention(*(y[:, :1] for y in x[:3]), x.log_decay, impl=impl).o
    own = (x.q[:, :1].double() * x.k[:, :1].double()).sum(-1, keepdim=True) * x.v[:, :1].double()
    assert torch.equal(first.double(), own.to(dtype).double())
