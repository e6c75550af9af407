"""Ours against transformers' MiniMax on a CPU: same weights, fp32, both in one process."""

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sevenfold.bench.measure import (
    interleaved_median_s,
    matmul_flops_per_s,
    memory_bytes,
    read_bytes_per_s,
    reset_peak_memory,
)
from sevenfold.bench.peer import load_peer, peer_generate, peer_logits, peer_loss
from sevenfold.engine import Decoder
from sevenfold.models import HybridModel, init_weights, preset
from sevenfold.models.accounting import decode_bytes, prefill_flops, training_flops
from sevenfold.ops import linear_cross_entropy
from sevenfold.optim import AdamWConfig, build_adamw

PRESET = "bench-19m"
THREADS = 2
PROMPT_TOKENS = 128
NEW_TOKENS = 64
TRAIN_ROWS, TRAIN_TOKENS = 4, 1024
AUX_LOSS_COEF = 0.001

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One kind of work: how to build each side of it, and its floor.

    ours and peer take our model and transformers'; what they return does the work once.
    """

    name: str
    repeats: int
    ours: Callable[[HybridModel], Run]
    peer: Callable[[Any], Run]
    floor_s: Callable[[float, float], float]  # of FLOP/s and bytes/s
    target: float


def cases() -> dict[str, Case]:
    """Return the benchmark's cases by name."""
    built = (
        _forward_case(2048, repeats=9, target=1.5),
        _forward_case(16_384, repeats=3, target=2.5),
        Case("decode", 3, _our_decoding, _peer_decoding, _decode_floor, 3.0),
        Case("training step 4 x 1,024", 5, _our_training, _peer_training, _train_floor, 3.0),
    )
    return {case.name: case for case in built}


def run_cpu_benchmark(report: Callable[[Mapping[str, Any]], None]) -> list[dict[str, Any]]:
    """Check both sides against fp64, then time and weigh every case.

    Args:
        report: called with each case's row as it is done.

    Returns:
        One row a case: medians, ratio, floor, memory of both sides.

    Raises:
        AssertionError: a side is wrong.
        UnsupportedError: transformers is not installed.
    """
    torch.set_num_threads(THREADS)
    model = build_model()
    peer = load_peer(model)
    errors = check_sides(model, peer)
    flops_per_s, bytes_per_s = matmul_flops_per_s(), read_bytes_per_s()
    rows = []
    for case in cases().values():
        sides = {"ours": case.ours(model), "transformers": case.peer(peer)}
        times = interleaved_median_s(sides, case.repeats)
        del sides
        row = {
            "case": case.name,
            "ours_s": times["ours"],
            "transformers_s": times["transformers"],
            "ratio": times["transformers"] / times["ours"],
            "target_ratio": case.target,
            "floor_s": case.floor_s(flops_per_s, bytes_per_s),
            "ours_peak_bytes": _peak_in_own_process("ours", case.name),
            "transformers_peak_bytes": _peak_in_own_process("transformers", case.name),
            "matmul_flops_per_s": flops_per_s,
            "read_bytes_per_s": bytes_per_s,
            **errors,
        }
        report(row)
        rows.append(row)
    return rows


def build_model() -> HybridModel:
    """Return the benchmark's model, always the same weights."""
    return init_weights(HybridModel(preset(PRESET)), seed=0).eval()


def check_sides(model: HybridModel, peer: Any) -> dict[str, float]:
    """Compare both sides' logits with our model's in fp64.

    Returns:
        The largest error of each, relative to the largest logit.

    Raises:
        AssertionError: ours is further off than twice the peer, or the peer is another model.
    """
    ids = _ids(1, 512)
    with torch.inference_mode():
        ours, theirs = model(ids), peer_logits(peer.eval(), ids)
        exact = init_weights(HybridModel(preset(PRESET)), seed=0).double().eval()(ids)
    largest = exact.abs().max()
    errors = {
        "ours_error": float((ours - exact).abs().max() / largest),
        "transformers_error": float((theirs - exact).abs().max() / largest),
    }
    # Their decay has 1e-5 in one more place than the original's (docs/checkpoints.md), hence 1e-3.
    assert errors["transformers_error"] < 1e-3, f"the peer must be the same model, got {errors}"
    bound = 2 * (errors["transformers_error"] + torch.finfo(torch.float32).eps)
    assert errors["ours_error"] <= bound, f"ours must keep to the error rule, got {errors}"
    return errors


def _ids(num_rows: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(preset(PRESET).vocab_size, (num_rows, num_tokens), generator=generator)


def _forward_case(num_tokens: int, *, repeats: int, target: float) -> Case:
    ids = _ids(1, num_tokens)

    def floor_s(flops_per_s: float, _bytes_per_s: float) -> float:
        return prefill_flops(preset(PRESET), num_tokens) / flops_per_s

    return Case(
        f"forward 1 x {num_tokens:,}",
        repeats,
        lambda model: torch.inference_mode()(lambda: model.eval()(ids)),
        lambda peer: torch.inference_mode()(lambda: peer_logits(peer.eval(), ids)),
        floor_s,
        target,
    )


def _our_decoding(model: HybridModel) -> Run:
    prompt = _ids(1, PROMPT_TOKENS)[0].tolist()
    model.eval()

    def run() -> list[int]:
        decoder = Decoder(model, [prompt], capacity_tokens=PROMPT_TOKENS + NEW_TOKENS)
        tokens = [int(decoder.prefill(PROMPT_TOKENS)[0].argmax())]
        while len(tokens) < NEW_TOKENS:
            tokens.append(int(decoder.step(tokens[-1:])[0].argmax()))
        return tokens

    return run


def _peer_decoding(peer: Any) -> Run:
    ids = _ids(1, PROMPT_TOKENS)
    peer.eval()
    return lambda: peer_generate(peer, ids, NEW_TOKENS)


def _decode_floor(_flops_per_s: float, bytes_per_s: float) -> float:
    return NEW_TOKENS * decode_bytes(preset(PRESET), PROMPT_TOKENS, 4) / bytes_per_s


def _our_training(model: HybridModel) -> Run:
    ids = _ids(TRAIN_ROWS, TRAIN_TOKENS + 1)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    model.train()
    optimizer = build_adamw(model.named_parameters(), AdamWConfig(lr=1e-5))

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        out = model.hidden(inputs)
        loss = linear_cross_entropy(out.hidden, model.lm_head.weight, labels) / labels.numel()
        stats = model.router_stats(out.router)
        balance = 0.0 if stats is None else stats.balance_loss.mean()
        (loss + AUX_LOSS_COEF * balance).backward()
        optimizer.step()

    return run


def _peer_training(peer: Any) -> Run:
    ids = _ids(TRAIN_ROWS, TRAIN_TOKENS + 1)[:, :-1].contiguous()
    peer.train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        peer_loss(peer, ids, ids).backward()
        optimizer.step()

    return run


def _train_floor(flops_per_s: float, _bytes_per_s: float) -> float:
    return training_flops(preset(PRESET), [TRAIN_TOKENS] * TRAIN_ROWS) / flops_per_s


def _peak_in_own_process(side: str, case_name: str) -> int:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_bytes, side, case_name).result()


def peak_bytes(side: str, case_name: str) -> int:
    """Return what a run of a case adds to this process's memory, at its peak.

    A first run comes before: what it loads of the libraries themselves is no need of the case.
    """
    torch.set_num_threads(THREADS)
    case, model = cases()[case_name], build_model()
    run = case.ours(model) if side == "ours" else case.peer(load_peer(model))
    del model
    run()
    before = reset_peak_memory()
    run()
    return memory_bytes("VmHWM") - before
