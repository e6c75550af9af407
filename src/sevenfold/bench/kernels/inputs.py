"""Random inputs of a case: the same numbers for every side, on whichever process it runs."""

import zlib
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sevenfold.bench.kernels.cases import NUM_LAYERS, STATE_BYTES, WIDTH, Case, Task
from sevenfold.ops import layer_log_decay

DRAFT_TOKENS = 4  # of a verification
CHECK_STEPS = 20  # decoding steps compared with fp64: more than a replay ring holds
_ROTATE_BYTES = 2**28  # states that decoding goes round, four times an H200's L2
_MAX_TURNS = 64


@dataclass(frozen=True)
class Inputs:
    """Whole sequences: q, k, v and do [B, T, H, D] bf16, log_decay [H] fp32.

    do is None where nothing is differentiated, cu_seqlens [N + 1] int32 (on the CPU) where nothing
    is packed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor | None
    log_decay: Tensor
    cu_seqlens: Tensor | None


@dataclass(frozen=True)
class DecodeInputs:
    """Decoding or verification of B sequences, whose states lie anywhere in a pool.

    q, k, v [steps, B, H, 128] bf16: tokens one after another. log_decay [H] fp32. slots
    [turns, B] int64: a turn takes B slots of a pool of turns * B, no two alike, so that successive
    turns find no state in a cache.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    slots: Tensor

    @property
    def turns(self) -> int:
        """How many calls touch each slot of the pool once."""
        return len(self.slots)

    def new_pool(self) -> Tensor:
        """Return a pool [turns * B, H, 128, 128] fp32 of random states, the same each time."""
        generator = torch.Generator(self.q.device).manual_seed(1)
        shape = (self.slots.numel(), self.q.shape[2], WIDTH, WIDTH)
        return torch.randn(shape, generator=generator, device=self.q.device)


def case_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the inputs of a case over whole sequences."""
    generator = torch.Generator(device).manual_seed(_seed(case))
    shape = (case.B, case.T, case.H, case.width)
    q, k, v = (_normal(shape, generator) for _ in range(3))
    needs_do = case.task in (Task.BACKWARD, Task.MEMORY)
    do = _normal(shape, generator) if needs_do else None
    return Inputs(q, k, v, do, _log_decay(case, device), _cu_seqlens(case))


def decode_inputs(case: Case, device: torch.device) -> DecodeInputs:
    """Draw the inputs of a decoding or verification case."""
    generator = torch.Generator(device).manual_seed(_seed(case))
    steps = DRAFT_TOKENS if case.task is Task.VERIFY else CHECK_STEPS
    q, k, v = (_normal((steps, case.B, case.H, WIDTH), generator) for _ in range(3))
    turns = num_turns(case)
    slots = torch.randperm(turns * case.B, generator=generator, device=device)
    return DecodeInputs(q, k, v, _log_decay(case, device), slots.view(turns, case.B))


def num_turns(case: Case) -> int:
    """Return how many calls go round a pool that no cache holds: 2 to 64."""
    turns = -(-_ROTATE_BYTES // (case.B * case.H * STATE_BYTES))
    return max(2, min(_MAX_TURNS, turns))


def _seed(case: Case) -> int:
    return zlib.crc32(case.name.encode())


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)


def _log_decay(case: Case, device: torch.device) -> Tensor:
    return layer_log_decay(case.H, case.layer, NUM_LAYERS).to(device)


def _cu_seqlens(case: Case) -> Tensor | None:
    if case.lengths is None:
        return None
    return torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32)
