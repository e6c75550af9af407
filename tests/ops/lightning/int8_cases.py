"""A course of decoding, drafts and commits over states in int8, each call held to fp64."""

import torch
from decode_cases import gaps, spread
from lightning_statements import DECAYS
from torch import Tensor

from sevenfold.ops import (
    Int8ReplayPool,
    ReplayPool,
    dequantise_rows,
    lightning_attention_commit,
    lightning_attention_commit_int8,
    lightning_attention_replay,
    lightning_attention_replay_int8,
    lightning_attention_verify,
    lightning_attention_verify_int8,
    quantise_rows,
)
from sevenfold.ops.testing import check_error, error_bound

H, S = len(DECAYS["mixed"]), 3


class Int8Course:
    """One pool in an implementation; before each call a copy by the eager form, one in fp64."""

    def __init__(
        self, impl: str, sizes: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int
    ) -> None:
        (K, V, R), self.impl, self.dtype, self.device = sizes, impl, dtype, torch.device(device)
        self.widths, self.R, self.random = (K, V), R, torch.Generator().manual_seed(seed)
        self.log_decay = torch.tensor(DECAYS["mixed"], device=device)
        start = torch.randn(S, H, K, V, generator=self.random).to(device)
        codes, scale = quantise_rows(start)
        # What a slot's last user left in its ring must never count.
        nan = float("nan")
        rings = [torch.full((S, H, R, w), nan, device=device, dtype=dtype) for w in (K, V)]
        count = torch.zeros(S, H, dtype=torch.int32, device=device)
        parts = (codes, scale, *rings, count)
        self.pool = Int8ReplayPool(*(spread(x) for x in parts))
        self.drafted = [0] * S  # tokens of each slot's draft that may be accepted
        self.folds = 0

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.random))

    def slots(self) -> Tensor:
        some = torch.randperm(S, generator=self.random)[: self.integer(1, S)]
        return torch.cat([some[:1], torch.tensor([-1]), some[1:]]).to(self.device)

    def tokens(self, *lead: int) -> tuple[Tensor, ...]:
        shapes = ((*lead, H, w) for w in (self.widths[0], *self.widths))
        draws = (torch.randn(shape, generator=self.random) for shape in shapes)
        return tuple(x.to(self.device, self.dtype) for x in draws)

    def accepted(self, slots: Tensor) -> Tensor:
        """Some first tokens of each slot's draft."""
        chosen = torch.full((len(slots), 3), -1, dtype=torch.int32)
        for b, slot in enumerate(slots.tolist()):
            if slot >= 0:
                most = self.integer(0, self.drafted[slot])
                chosen[b, :most] = torch.arange(most)
                self.drafted[slot] = 0
        return chosen.to(self.device)

    def replay(self) -> None:
        slots = self.slots()
        q, k, v = self.tokens(len(slots))
        for slot in slots[slots >= 0].tolist():
            self.drafted[slot] = 0
        options = {"scale": 0.5}
        self.call(
            (lightning_attention_replay_int8, lightning_attention_replay), (q, k, v), slots, options
        )

    def verify(self, tree: bool) -> None:
        slots, T = self.slots(), self.integer(1, 3)
        sees = torch.ones(T, T, dtype=torch.bool).tril()
        if tree and T == 3:
            sees[2, 1] = False
        options = {
            "scale": 0.5,
            "accepted": self.accepted(slots),
            "ancestors": sees.expand(len(slots), T, T).to(self.device) if tree else None,
        }
        tokens = self.tokens(len(slots), T)
        self.call(
            (lightning_attention_verify_int8, lightning_attention_verify), tokens, slots, options
        )
        for slot in slots[slots >= 0].tolist():
            self.drafted[slot] = 1 if tree else T

    def commit(self) -> None:
        slots = self.slots()
        options = {"accepted": self.accepted(slots)}
        ops = (lightning_attention_commit_int8, lightning_attention_commit)
        self.call(ops, (), slots, options)

    def call(self, ops: tuple, tokens: tuple[Tensor, ...], slots: Tensor, options: dict) -> None:
        op, plain = ops
        before = self.pool.codes.clone()
        honest, exact = self.copy(), self.wide(torch.float64)
        single = self.wide(torch.float32)
        wide = [x.double() for x in tokens]
        found = op(*tokens, self.log_decay, self.pool, slots, impl=self.impl, **options)
        eager = op(*tokens, self.log_decay, honest, slots, impl="eager", **options)
        wanted = plain(*wide, self.log_decay, exact, slots, impl="reference", **options)
        plain(*(x.float() for x in tokens), self.log_decay, single, slots, impl="eager", **options)
        if tokens:
            check_error("o", found, eager, wanted)
        assert torch.equal(self.pool.count, honest.count)
        P = self.pool.count[:, 0]
        used = torch.arange(self.R, device=self.device)[None, :] < P[:, None]
        for name in ("ring_k", "ring_v"):
            mine, other = (getattr(x, name).transpose(1, 2)[used] for x in (self.pool, honest))
            assert torch.equal(mine, other)
        state = dequantise_rows(self.pool.codes, self.pool.scale).double()
        half_step = self.pool.scale.double()[..., None] / 2 * (1 + 2**-16)
        bound = half_step + error_bound(exact.state, single.state)
        assert bool(((state - exact.state).abs() <= bound).all())
        self.folds += int((self.pool.codes != before).flatten(1).any(1).sum())

    def copy(self) -> Int8ReplayPool:
        parts = ("codes", "scale", "ring_k", "ring_v", "count")
        return Int8ReplayPool(*(getattr(self.pool, name).clone() for name in parts))

    def wide(self, dtype: torch.dtype) -> ReplayPool:
        state = dequantise_rows(self.pool.codes, self.pool.scale).to(dtype)
        rings = (self.pool.ring_k.to(dtype), self.pool.ring_v.to(dtype))
        return ReplayPool(state, *(x.clone() for x in (*rings, self.pool.count)))

    def run(self, calls: int) -> None:
        for _ in range(calls):
            match self.integer(0, 6):
                case 0:
                    self.commit()
                case 1 | 2 | 3:
                    self.replay()
                case 4:
                    self.verify(tree=True)
                case _:
                    self.verify(tree=False)
        tensors = (x for x in self.pool.tensors())
        assert all(bool((gaps(x) == 7).all()) for x in tensors)
