"""A case on a side: right, wrong or refused; and each peer is called by its own conventions."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sevenfold.bench.kernels import measure as measuring
from sevenfold.bench.kernels import timing
from sevenfold.bench.kernels.cases import Case, Task, all_cases
from sevenfold.bench.kernels.measure import measure
from sevenfold.bench.kernels.sides import Side, Work, all_sides, side_named, sides_of
from sevenfold.config import ConfigError, UnsupportedError
from sevenfold.ops import lightning_attention

CPU = torch.device("cpu")
FORWARD = Case("forward", ("forward",), Task.FORWARD, 2, 70, 2)
BACKWARD = Case("backward", ("backward",), Task.BACKWARD, 2, 70, 2)
PACKED = Case("packed", ("packed",), Task.FORWARD, 1, 70, 2, lengths=(64, 1, 5))
DECODE = Case("decode", ("decode",), Task.DECODE, 2, 1, 2)
VERIFY = Case("verify", ("verify",), Task.VERIFY, 2, 4, 2)


@pytest.fixture(autouse=True)
def _short_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", 0.001)
    monkeypatch.setattr(timing, "WARM_UP_S", 0.001)
    monkeypatch.setattr("sevenfold.bench.kernels.inputs._MAX_TURNS", 2)


def measured(side: Side, case: Case) -> dict[str, Any]:
    return measure(side, side.builder(), CPU, case)


@pytest.mark.parametrize("case", [FORWARD, BACKWARD, PACKED, DECODE, VERIFY], ids=lambda c: c.name)
def test_ours_keeps_to_the_error_rule(case: Case) -> None:
    row = measured(side_named("sevenfold"), case)
    assert row["status"] == "ok"
    assert 0 < row["error_rule"] <= 1
    assert row["median_s"] > 0
    # Two turns of a decoding step; a verification goes round sixteen times.
    assert row["calls"] == {"decode": 2, "verify": 32}.get(case.name, 1)
    # Four tokens of two sequences and heads, a key and a value of 128 bf16 each.
    assert row.get("extra_bytes") == (2 * 2 * 4 * 512 if case is VERIFY else None)


def test_our_ring_is_timed_over_a_whole_round() -> None:
    row = measured(side_named("sevenfold ring"), DECODE)
    assert (row["status"], row["calls"], row["runs"]) == ("ok", 32, 3)


def tampered(change: float):
    """Our operator with an error put on the last token of the last head."""

    def build(case: Case, inputs: Any) -> Work:
        def run() -> Tensor:
            o = lightning_attention(inputs.q, inputs.k, inputs.v, inputs.log_decay).o
            o[-1, -1, -1] += change
            return o

        return Work(lambda: {"o": run()}, run)

    return build


@pytest.mark.parametrize("name", ["sevenfold", "fla chunk"])
@pytest.mark.parametrize("change", [1e4, float("inf"), float("nan")])
def test_a_wrong_result_is_called_so_and_timed(name: str, change: float) -> None:
    row = measure(side_named(name), tampered(change), CPU, FORWARD)
    assert row["status"] == "wrong"
    assert row["median_s"] > 0
    assert (row["error"] is None) == (change != 1e4)


def test_a_peer_is_measured_by_its_relative_error_alone() -> None:
    row = measure(side_named("fla chunk"), tampered(0.0), CPU, FORWARD)
    assert (row["status"], row["error_rule"]) == ("ok", None)
    assert 0 < row["error"] < measuring.MAX_RELATIVE_ERROR


def test_what_a_side_cannot_serve_is_said() -> None:
    def build(_case: Case, _inputs: Any) -> Work:
        raise UnsupportedError("widths must be at most 64, got 128")

    assert measure(side_named("fla chunk"), build, CPU, FORWARD) == {
        "status": "unsupported",
        "note": "widths must be at most 64, got 128",
    }


def test_work_outside_torchs_stream_is_waited_for() -> None:
    waited = []

    def build(case: Case, inputs: Any) -> Work:
        work = tampered(0.0)(case, inputs)
        return replace(work, wait=waited.append)

    row = measure(side_named("jax-linear-attention"), build, CPU, FORWARD)
    assert row["status"] == "ok"
    assert len(waited) >= 3


def test_long_softmax_is_timed_by_the_run_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    side = side_named("softmax flash")
    slow = {case.T for case in all_cases() if side.takes(case) and measuring._is_slow(side, case)}
    assert slow == {2**18, 2**19, 2**20}
    monkeypatch.setattr(measuring, "_SLOW_FLOPS", 1)
    row = measured(side, FORWARD)
    assert (row["status"], row["runs"], row["calls"]) == ("ok", 1, 1)
    assert not measuring._is_slow(side_named("sevenfold"), FORWARD)


def test_softmax_is_softmax() -> None:
    """PyTorch's flash attention runs on a CPU too; cuDNN's does not."""
    for case in (FORWARD, BACKWARD):
        assert measured(side_named("softmax flash"), case)["status"] == "ok"


def test_takes() -> None:
    cases = {case.name: case for case in all_cases()}
    taken = {
        side.name: {n for n, case in cases.items() if side.takes(case)} for side in all_sides()
    }
    assert taken["sevenfold"] == set(cases)
    assert taken["sevenfold ring"] == {n for n in cases if n.startswith("decode")}
    assert "sweep T4194304" in taken["fla chunk"]
    assert "sweep T4194304" not in taken["softmax flash"]
    million = "forward B1 T1048576 H4"
    assert {name for name, of in taken.items() if million in of} >= {"softmax flash", "seg_la"}
    assert all("packed skewed T32768 H64" not in taken[f"softmax {n}"] for n in ("flash", "cuDNN"))
    assert {name for name, of in taken.items() if "verify 4 tokens B64 H64" in of} == {
        "sevenfold",
        "seg_la",
    }


def test_sides_are_picked_by_name() -> None:
    assert sides_of([]) == all_sides()
    picked = sides_of(["seg_la", "sevenfold"])
    assert [side.name for side in picked] == ["sevenfold", "seg_la"]
    with pytest.raises(ConfigError, match=r"sides must be of sevenfold, .*, got fla$"):
        sides_of(["fla"])


def test_a_side_that_cannot_be_imported_is_not_installed() -> None:
    ours = side_named("sevenfold")
    assert (ours.is_installed(), ours.version()) == (True, "0.1.0")
    nowhere = replace(ours, module="no_such_peer.ops", package="no-such-peer")
    assert (nowhere.is_installed(), nowhere.version()) == (False, None)


# Fakes of the peers, which take what the real ones take and compute it by our own operator.


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, **packing: Any
):
    """In fp64, so that what a fake adds to the error is nothing."""
    q, k, v = (x.double() for x in (q, k, v))
    state = None if state is None else state.double()
    return lightning_attention(
        q, k, v, log_decay, initial_state=state, return_final_state=True, impl="eager", **packing
    )


def fake_fla() -> ModuleType:
    module = ModuleType("fla.ops.simple_gla")

    def chunk(q, k, v, *, g_gamma, scale, cu_seqlens=None, chunk_size=64):
        assert (scale, chunk_size in (64, 128)) == (1.0, True)
        if cu_seqlens is not None:
            assert cu_seqlens.dtype == torch.long
            cu_seqlens = cu_seqlens.int()
        return recurrence(q, k, v, g_gamma, cu_seqlens=cu_seqlens).o.to(q.dtype), None

    def recurrent(q, k, v, *, g_gamma, scale, initial_state, output_final_state):
        assert (scale, q.shape[1], output_final_state) == (1.0, 1, True)
        o, state = recurrence(q, k, v, g_gamma, initial_state)
        return o.to(q.dtype), state.float()

    module.__dict__.update(
        chunk_simple_gla=chunk,
        fused_chunk_simple_gla=lambda *args, **kw: chunk(*args, **kw),
        fused_recurrent_simple_gla=recurrent,
    )
    return module


def fake_lightning_attn() -> ModuleType:
    module = ModuleType("lightning_attn.ops")

    def lightning_attn_func(q, k, v, slopes):
        assert all(x.is_contiguous() for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return recurrence(q, k, v, -slopes).o.to(q.dtype).transpose(1, 2)

    module.__dict__["lightning_attn_func"] = lightning_attn_func
    return module


@dataclass
class FakeMeta:
    batch_size: int
    max_q_length: int
    q_offsets: Tensor
    s_offsets: Tensor
    q_lengths: Tensor
    s_scales: Tensor


def seg_la_fwd(q, k, v, s, decay_scales, meta, caches=None, cache_indices=None, softmax_scale=None):
    """Sequences of any lengths, one after another, from states in a pool."""
    assert softmax_scale == 1
    assert meta.max_q_length == int(meta.q_lengths.max())
    outputs = []
    for n in range(meta.batch_size):
        start, slot = int(meta.q_offsets[n]), int(meta.s_offsets[n])
        state = s[slot : slot + 1] * meta.s_scales[n]
        for t in range(start, start + int(meta.q_lengths[n])):
            tokens = (x[None, t : t + 1] for x in (q, k, v))
            o, state = recurrence(*tokens, -decay_scales, state)
            state = state.float()
            outputs.append(o[0])
            if caches is not None:
                caches[cache_indices[n], t - start] = state[0]
        if caches is None:
            s[slot] = state[0]
    return torch.cat(outputs).to(q.dtype)


def fake_seg_la() -> ModuleType:
    module = ModuleType("sglang.kernels.ops.attention.linear.seg_la")
    module.__dict__.update(SegLaMeta=FakeMeta, seg_la_fwd=seg_la_fwd)
    return module


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    files = ("peer_fla", "peer_lightning_attn", "peer_sglang")
    for module in (fake_fla(), fake_lightning_attn(), fake_seg_la()):
        parts = module.__name__.split(".")
        for count in range(1, len(parts)):
            above = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, above, SimpleNamespace(__path__=[]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for file in files:
        monkeypatch.delitem(sys.modules, f"sevenfold.bench.kernels.{file}", raising=False)
    yield
    for file in files:
        sys.modules.pop(f"sevenfold.bench.kernels.{file}", None)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("fla chunk", FORWARD),
        ("fla chunk", BACKWARD),
        ("fla chunk", PACKED),
        ("fla chunk 128", FORWARD),
        ("fla fused_chunk", FORWARD),
        ("fla fused_recurrent", DECODE),
        ("lightning-attn", FORWARD),
        ("lightning-attn", BACKWARD),
        ("seg_la", FORWARD),
        ("seg_la", PACKED),
        ("seg_la", DECODE),
        ("seg_la", VERIFY),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
@pytest.mark.usefixtures("peers")
def test_peers_are_called_as_they_want_to_be(name: str, case: Case) -> None:
    row = measured(side_named(name), case)
    assert row["status"] == "ok", row
    # A state of 64 KiB for each of four tokens of two sequences and heads.
    assert row.get("extra_bytes") == (2 * 2 * 4 * 65_536 if case is VERIFY else None)
