"""A course of decoding, drafts and commits over a pool, and what the recurrence says of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from lightning_statements import DECAYS
from torch import Tensor

from sevenfold.ops import (
    ReplayPool,
    lightning_attention_commit,
    lightning_attention_replay,
    lightning_attention_verify,
)
from sevenfold.ops.testing import check_error


class Sizes(NamedTuple):
    K: int = 2
    V: int = 3
    R: int = 4
    most_drafted: int = 3
    decay: str = "mixed"
    slots: int = 4
    apart: bool = False


class Draft(NamedTuple):
    k: Tensor  # [T, H, K]
    v: Tensor  # [T, H, V]
    sees: Tensor  # [T, T] bool


def spread(pool: Tensor, gap: int = 16) -> Tensor:
    """The pool with other things between its slots, as an arena holds it; they stay as they are."""
    size = pool[0].numel() + gap
    arena = torch.full((len(pool) * size,), 7, dtype=pool.dtype, device=pool.device)
    return arena.as_strided(pool.shape, (size, *pool.stride()[1:])).copy_(pool)


def gaps(pool: Tensor, gap: int = 16) -> Tensor:
    """What lies between the slots of spread's result."""
    size = pool.stride(0)
    return pool.as_strided((len(pool), gap), (size, 1), size - gap)


class Course:
    """One pool in an implementation under test, beside it every slot's state by the recurrence."""

    def __init__(self, impl: str, sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> None:
        self.impl, self.sizes, self.dtype, self.device = impl, sizes, dtype, torch.device(device)
        self.random = torch.Generator().manual_seed(seed)
        self.log_decay = torch.tensor(DECAYS[sizes.decay])
        S, H = sizes.slots, len(self.log_decay)
        self.pool = ReplayPool.zeros(
            S, H, (sizes.K, sizes.V), ring_tokens=sizes.R, dtype=dtype, device=device
        )
        if sizes.apart:
            self.pool = ReplayPool(*(spread(x) for x in self.pool.tensors()))
        # What a slot's last user left in its ring must never count.
        self.pool.ring_k.fill_(float("nan"))
        self.pool.ring_v.fill_(float("nan"))
        start = torch.randn(S, H, sizes.K, sizes.V, generator=self.random)
        self.pool.state.copy_(start)
        self.exact, self.honest = list(start.double()), list(start)
        self.drafts: list[Draft | None] = [None] * S
        self.outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # found, honest, exact

    def integer(self, low: int, high: int) -> int:
        """A random one from low to high."""
        return int(torch.randint(low, high + 1, (1,), generator=self.random))

    def advance(self, S: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The state after tokens k [T, H, K], v [T, H, V], one after another."""
        decay = torch.exp(self.log_decay.to(S.dtype))[:, None, None]
        for k_t, v_t in zip(k.to(S.dtype), v.to(S.dtype), strict=True):
            S = decay * S + k_t[:, :, None] * v_t[:, None, :]
        return S

    def choose_slots(self) -> Tensor:
        """Some of the slots in any order, and a row that is skipped."""
        some = torch.randperm(self.sizes.slots, generator=self.random)
        some = some[: self.integer(1, self.sizes.slots)]
        at = self.integer(0, len(some))
        dtype = (torch.int32, torch.int64)[self.integer(0, 1)]
        return torch.cat([some[:at], torch.tensor([-1]), some[at:]]).to(dtype)

    def tokens(self, *lead: int) -> tuple[Tensor, Tensor, Tensor]:
        H, (K, V) = len(self.log_decay), self.sizes[:2]
        shapes = ((*lead, H, K), (*lead, H, K), (*lead, H, V))
        return tuple(torch.randn(s, generator=self.random).to(self.dtype) for s in shapes)

    def replay(self) -> None:
        slots = self.choose_slots()
        q, k, v = self.tokens(len(slots))
        found = self.call(lightning_attention_replay, (q, k, v), slots)
        for b, slot in enumerate(slots.tolist()):
            path = torch.tensor([0])
            self.expect(found[b], slot, q[b], Draft(k[b, None], v[b, None], path[None]), path)
            if slot >= 0:
                self.accept(slot, Draft(k[b, None], v[b, None], path[None]), path)
                self.drafts[slot] = None

    def verify(self, tree: bool) -> None:
        most = self.sizes.most_drafted
        slots, T = self.choose_slots(), self.integer((most + 1) // 2, most)
        q, k, v = self.tokens(len(slots), T)
        sees = torch.ones(len(slots), T, T, dtype=torch.bool).tril()
        if tree:
            sees = torch.stack([self.tree(T) for _ in slots])
        accepted = self.accepted(slots)
        found = self.call(
            lightning_attention_verify,
            (q, k, v),
            slots,
            accepted=accepted,
            ancestors=sees.to(self.device) if tree else None,
        )
        for b, slot in enumerate(slots.tolist()):
            for t in range(T):
                draft = Draft(k[b], v[b], sees[b])
                self.expect(found[b, t], slot, q[b, t], draft, sees[b, t].nonzero().flatten())
            if slot >= 0:
                self.drafts[slot] = Draft(k[b], v[b], sees[b])

    def commit(self) -> None:
        slots = self.choose_slots()
        self.settle(slots, self.accepted(slots))

    def settle(self, slots: Tensor, accepted: Tensor) -> None:
        log_decay, slots = self.log_decay.to(self.device), slots.to(self.device)
        lightning_attention_commit(log_decay, self.pool, slots, accepted=accepted, impl=self.impl)
        for slot in slots.tolist():
            if slot >= 0:
                self.drafts[slot] = None

    def call(self, op: Callable, tokens: tuple[Tensor, ...], slots: Tensor, **options) -> Tensor:
        q, k, v, log_decay = (x.to(self.device) for x in (*tokens, self.log_decay))
        options |= {"scale": 0.5, "impl": self.impl}
        return op(q, k, v, log_decay, self.pool, slots.to(self.device), **options).cpu()

    def tree(self, T: int) -> Tensor:
        """Who sees whom where each token's parent is the state or any token before it."""
        sees = torch.eye(T, dtype=torch.bool)
        for t in range(1, T):
            parent = self.integer(-1, t - 1)
            if parent >= 0:
                sees[t] |= sees[parent]
        return sees

    def accepted(self, slots: Tensor) -> Tensor:
        """Accept a path, often one with gaps, of each slot's draft, or nothing of it."""
        chosen = torch.full((len(slots), self.sizes.most_drafted), -1, dtype=torch.int32)
        for b, slot in enumerate(slots.tolist()):
            draft = self.drafts[slot] if slot >= 0 else None
            if draft is not None and self.integer(0, 5):
                last = self.integer(len(draft.k) // 2, len(draft.k) - 1)
                path = draft.sees[last].nonzero().flatten()
                chosen[b, : len(path)] = path
                self.accept(slot, draft, path)
        return chosen.to(self.device)

    def accept(self, slot: int, draft: Draft, path: Tensor) -> None:
        k, v = draft.k[path], draft.v[path]
        self.exact[slot] = self.advance(self.exact[slot], k, v)
        self.honest[slot] = self.advance(self.honest[slot], k, v)

    def expect(self, found: Tensor, slot: int, q: Tensor, draft: Draft, path: Tensor) -> None:
        """Note what q gives behind a path of a draft, besides what was found."""
        if slot < 0:
            assert torch.equal(found, torch.zeros_like(found)), "a row that is skipped is zero"
            return
        exact, honest = (
            0.5 * torch.einsum("hk,hkv->hv", q.to(S.dtype), S)
            for S in (
                self.advance(before[slot], draft.k[path], draft.v[path])
                for before in (self.exact, self.honest)
            )
        )
        self.outputs.append((found, honest.to(self.dtype), exact))

    def run(self, calls: int) -> "Course":
        for _ in range(calls):
            match self.integer(0, 5):
                case 0:
                    self.commit()
                case 1 | 2:
                    self.replay()
                case 3 | 4:
                    self.verify(tree=True)
                case _:
                    self.verify(tree=False)
        return self

    def check(self) -> None:
        """Raise AssertionError unless outputs, and at last states, keep to the error rule."""
        if self.outputs:
            check_error("o", *(torch.stack(x) for x in zip(*self.outputs, strict=True)))
        slots = torch.arange(self.sizes.slots)
        self.settle(slots, self.accepted(slots))
        honest, exact = torch.stack(self.honest), torch.stack(self.exact)
        check_error("state", self.pool.state.cpu(), honest, exact)
        assert not self.pool.count.any()
        if self.sizes.apart:
            assert all(bool((gaps(x) == 7).all()) for x in self.pool.tensors())
