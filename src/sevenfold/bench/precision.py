"""What fewer bits change in a model's logits: snapshots, running states, weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sevenfold.data import austen_paths
from sevenfold.engine.cache import Arena
from sevenfold.engine.cache.arena import index_of
from sevenfold.engine.memory import MemoryPlan, plan_memory
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.quantised_weights import load_quantised_model
from sevenfold.engine.rows import Row
from sevenfold.engine.runner import Runner
from sevenfold.engine.storage import Storage
from sevenfold.models import HybridModel
from sevenfold.models.accounting import weight_bytes
from sevenfold.models.checkpoint import load_model

PAGE_TOKENS = 64
STATES = ("fp16", "int8")
SNAPSHOTS = ("fp32", "fp16", "int8", "auto")
WEIGHTS = ("int8-experts", "int8", "fp8-experts", "fp8")


@dataclass(frozen=True)
class Chats:
    """ids [N, T]: N texts, read token by token; after each turn their states go through snapshots.

    The worst case for a prefix cache: each turn comes back to what the last one left there.
    """

    ids: Tensor
    turn_tokens: int


def run_precision_benchmark(
    checkpoint: Path,
    report: Callable[[Mapping[str, Any]], None],
    *,
    num_texts: int = 8,
    num_turns: int = 4,
    turn_tokens: int = 256,
) -> list[dict[str, Any]]:
    """Compare logits with those of fp32 states, snapshots and weights on a bundled novel.

    Args:
        checkpoint: a folder with a tokenizer.json.
        report: told each row as it comes.
        num_texts: read side by side.
        num_turns: of each text; the states go through a snapshot between two.
        turn_tokens: of each turn.

    Returns:
        One row for each case; see compare for its figures.
    """
    model = load_model(checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    chats = Chats(_texts(tokenizer, num_texts, num_turns * turn_tokens), turn_tokens)
    exact = list(read(model, chats, _plan(model, chats)))
    rows = []
    for name, num_bytes, logits in _cases(checkpoint, model, chats):
        row = {"case": name, "bytes": num_bytes, **compare(exact, logits, chats)}
        report(row)
        rows.append(row)
    return rows


def read(model: HybridModel, chats: Chats, plan: MemoryPlan) -> Iterator[Tensor]:
    """Give the logits [N, vocab_size] after each token, decoded through an engine's storage."""
    storage = Storage(model.config, plan, device=model.device, dtype=model.dtype)
    runner = Runner(model, storage, page_tokens=plan.page_tokens)
    N, T = chats.ids.shape
    arena = Arena(plan.layout)
    states = _take(arena, Tenant.STATE, N * plan.has_states)
    snapshots = _take(arena, Tenant.SNAPSHOT, N * plan.has_states)
    pages = [_take(arena, Tenant.PAGE, plan.num_pages(T)) for _ in range(N)]
    ids = chats.ids.tolist()
    for t in range(T):
        if t and t % chats.turn_tokens == 0:
            storage.snapshot(states, snapshots)
            storage.restore(snapshots, states)
        slots = states or [None] * N
        yield runner.run([Row(ids[n][t : t + 1], t, slots[n], pages[n], {}, n) for n in range(N)])


def compare(exact: Sequence[Tensor], found: Iterator[Tensor], chats: Chats) -> dict[str, float]:
    """Return how far logits lie from the exact ones, over all tokens after the first turn.

    Args:
        exact: [N, vocab_size] for each token.
        found: as exact.
        chats: the texts, whose next tokens the loss is of.

    Returns:
        logit_error: root mean square of the difference over that of the exact logits (each row
        less its mean); logit_error_max: the largest difference; kl: mean of KL(exact | found) in
        nats, kl_max; same_top: share of tokens with the same most probable one; loss_change:
        difference of the mean losses in nats.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    most_error = most_kl = 0.0
    for t, (before, after) in enumerate(zip(exact, found, strict=True)):
        if chats.turn_tokens <= t < chats.ids.shape[1] - 1:
            difference = (after - before).double()
            p, q = (x.double().log_softmax(-1) for x in (before, after))
            kl = (p.exp() * (p - q)).sum(-1)
            same = (before.argmax(-1) == after.argmax(-1)).double()
            chosen = chats.ids[:, t + 1 : t + 2]
            loss = (p - q).gather(1, chosen)
            spread = (before.double() - before.double().mean(-1, keepdim=True)).square()
            sums += torch.stack(
                [difference.square().mean(), spread.mean(), kl.mean(), same.mean(), loss.mean()]
            )
            most_error = max(most_error, float(difference.abs().max()))
            most_kl = max(most_kl, float(kl.max()))
    count = chats.ids.shape[1] - 1 - chats.turn_tokens
    square, spread, kl, same, loss = sums.tolist()
    return {
        "logit_error": (square / spread) ** 0.5,
        "logit_error_max": most_error,
        "kl": kl / count,
        "kl_max": most_kl,
        "same_top": same / count,
        "loss_change": loss / count,
    }


def _cases(
    checkpoint: Path, model: HybridModel, chats: Chats
) -> Iterator[tuple[str, int, Iterator[Tensor]]]:
    """Name, bytes and logits of each case."""
    for dtype in SNAPSHOTS:
        plan = _plan(model, chats, snapshot_dtype=dtype)
        yield f"snapshots {dtype}", plan.snapshot_bytes, read(model, chats, plan)
    for dtype in STATES:
        plan = _plan(model, chats, state_dtype=dtype)
        yield f"states {dtype}", plan.state_bytes, read(model, chats, plan)
    for weights in WEIGHTS:
        held = load_quantised_model(checkpoint, weights, dtype=torch.float32)
        logits = read(held, chats, _plan(held, chats))
        yield f"weights {weights}", weight_bytes(model.config, weights, 4), logits


def _plan(model: HybridModel, chats: Chats, **dtypes: Any) -> MemoryPlan:
    N, T = chats.ids.shape
    size = {"page_tokens": PAGE_TOKENS, "kv_element_bytes": model.dtype.itemsize}
    one = plan_memory(model.config, budget_bytes=1 << 40, context_tokens=T, **size, **dtypes)
    # Room for each text's state, snapshot and pages, in slabs of their own.
    slabs = 1 + N * (2 + one.num_pages(T))
    budget = slabs * one.layout.slab_bytes
    return plan_memory(model.config, budget_bytes=budget, context_tokens=T, **size, **dtypes)


def _texts(tokenizer: Tokenizer, num_texts: int, num_tokens: int) -> Tensor:
    """[N, T] tokens from evenly spaced places of a novel."""
    text = austen_paths()[0].read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    step = (len(ids) - num_tokens) // num_texts
    return torch.stack([ids[n * step : n * step + num_tokens] for n in range(num_texts)])


def _take(arena: Arena, tenant: Tenant, count: int) -> list[int]:
    handles = arena.take(tenant, count)
    if handles is None:
        raise AssertionError("the plan was made for that many")
    return [index_of(handle) for handle in handles]
