"""What a case's outputs must be, in fp64, on a sample of its rows and heads.

Heads and rows do not mix, so a few of them can be computed alone: the first, a middle and the last
head of the first and the last row. Of a long row the last tokens are compared, from a state that is
one sum over all that is before them. The last ones lie at the largest offsets, where 32-bit
indexing goes wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sevenfold.bench.kernels.cases import Case, Task
from sevenfold.bench.kernels.inputs import DecodeInputs, Inputs
from sevenfold.ops import lightning_attention, lightning_attention_step
from sevenfold.ops.testing import error_bound

# A peer with a larger error is called wrong. bf16 operands give 1e-3 to 1e-2.
MAX_RELATIVE_ERROR = 1e-2

_WHOLE_TOKENS = 65_536
_LAST_TOKENS = 32_768  # of a longer row

_SOFTMAX_WHOLE_TOKENS = 32_768  # fp64 scores of one head: 8.6 GB
_SOFTMAX_QUERIES = 128  # of a longer one


@dataclass(frozen=True)
class Sample:
    """Rows and heads that are compared, and tokens where not all of them are."""

    rows: tuple[int, ...]
    heads: tuple[int, ...]
    tokens: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """Take the sample of [B, T, H, D]."""
        rows = [torch.stack([x[row, :, head] for head in self.heads], 1) for row in self.rows]
        picked = torch.stack(rows)
        return picked if self.tokens is None else picked[:, self.tokens]


@dataclass(frozen=True)
class Expected:
    """The fp64 outputs of a case's sample, and the same by eager PyTorch in bf16, by name."""

    sample: Sample
    exact: Mapping[str, Tensor]
    eager: Mapping[str, Tensor] | None = None

    def relative_error(self, outputs: Mapping[str, Tensor]) -> float:
        """Return the largest ||x - exact|| / ||exact|| over all outputs."""
        return max(self._relative(name, outputs[name]) for name in self.exact)

    def share_of_bound(self, outputs: Mapping[str, Tensor]) -> float | None:
        """Return the largest share of the error rule's bound that an output uses up.

        At most 1 keeps to docs/numerics.md. None where eager has not been run.
        """
        if self.eager is None:
            return None
        return max(
            float((self.sample.of(outputs[name]).double() - exact).abs().max())
            / error_bound(exact, self.eager[name])
            for name, exact in self.exact.items()
        )

    def _relative(self, name: str, output: Tensor) -> float:
        exact = self.exact[name]
        return float((self.sample.of(output).double() - exact).norm() / exact.norm())


def expect_lightning(case: Case, inputs: Inputs, with_eager: bool) -> Expected:
    """Compute what lightning attention must return: o, and the gradients where do is given."""
    sample = Sample(_ends(case.B), _first_middle_last(case.H))
    if case.task is Task.FORWARD and case.T > _WHOLE_TOKENS:
        return _expect_last(sample, inputs, with_eager)
    exact = _lightning(inputs, sample, torch.float64)
    eager = _lightning(inputs, sample, inputs.q.dtype) if with_eager else None
    return Expected(sample, exact, eager)


def _expect_last(sample: Sample, inputs: Inputs, with_eager: bool) -> Expected:
    T = inputs.q.shape[1]
    cut = T - _LAST_TOKENS
    log_decay = inputs.log_decay[list(sample.heads)]
    states = [[_state(inputs, row, head, cut) for head in sample.heads] for row in sample.rows]
    state = torch.stack([torch.stack(of_row) for of_row in states])

    def last(dtype: torch.dtype) -> dict[str, Tensor]:
        q, k, v = (sample.of(x[:, cut:]).to(dtype) for x in (inputs.q, inputs.k, inputs.v))
        start = state.to(torch.promote_types(dtype, torch.float32))
        o = lightning_attention(q, k, v, log_decay, initial_state=start, impl="eager").o
        return {"o": o}

    tokens = torch.arange(cut, T, device=inputs.q.device)
    eager = last(inputs.q.dtype) if with_eager else None
    return Expected(replace(sample, tokens=tokens), last(torch.float64), eager)


def _state(inputs: Inputs, row: int, head: int, tokens: int) -> Tensor:
    """The state after some tokens, as one sum: one head at a time, since fp64 takes much memory."""
    k, v = (x[row, :tokens, head].double() for x in (inputs.k, inputs.v))
    age = torch.arange(tokens - 1, -1, -1, dtype=torch.float64, device=k.device)
    return (k * torch.exp(age * inputs.log_decay[head])[:, None]).T @ v


def expect_decode(case: Case, inputs: DecodeInputs, with_eager: bool) -> Expected:
    """Compute what decoding, or verifying, the tokens from the states in the pool must return."""
    sample = Sample(tuple(range(len(inputs.q))), _first_middle_last(case.H))
    pool = inputs.new_pool()[inputs.slots[0]]
    exact = {"o": sample.of(_decoded(inputs, pool.double(), torch.float64))}
    eager = {"o": sample.of(_decoded(inputs, pool, inputs.q.dtype))} if with_eager else None
    return Expected(sample, exact, eager)


def expect_softmax(case: Case, inputs: Inputs) -> Expected:
    """Compute what causal softmax attention must return, for the last head of the last row."""
    tokens = None
    if case.T > _SOFTMAX_WHOLE_TOKENS:
        tokens = torch.linspace(0, case.T - 1, _SOFTMAX_QUERIES, device=inputs.q.device).long()
    sample = Sample((case.B - 1,), (case.H - 1,), tokens)
    whole = Sample(sample.rows, sample.heads)
    q, k, v = (whole.of(x)[0, :, 0].double() for x in (inputs.q, inputs.k, inputs.v))
    with torch.enable_grad():
        leaves = [x.requires_grad_(case.task is not Task.FORWARD) for x in (q, k, v)]
        o = _softmax_attention(q, k, v, tokens)
    exact = {"o": o.detach()[None, :, None]}
    if inputs.do is not None:
        grads = torch.autograd.grad(o, leaves, whole.of(inputs.do)[0, :, 0].double())
        exact |= {f"d{n}": x[None, :, None] for n, x in zip("qkv", grads, strict=True)}
    return Expected(sample, exact)


def _lightning(inputs: Inputs, sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    q, k, v = (sample.of(x).to(dtype) for x in (inputs.q, inputs.k, inputs.v))
    log_decay = inputs.log_decay[list(sample.heads)]
    with torch.enable_grad():
        leaves = [x.requires_grad_(inputs.do is not None) for x in (q, k, v)]
        o = lightning_attention(q, k, v, log_decay, cu_seqlens=inputs.cu_seqlens, impl="eager").o
    outputs = {"o": o.detach()}
    if inputs.do is not None:
        grads = torch.autograd.grad(o, leaves, sample.of(inputs.do).to(dtype))
        outputs |= {f"d{name}": x for name, x in zip("qkv", grads, strict=True)}
    return outputs


def _decoded(inputs: DecodeInputs, state: Tensor, dtype: torch.dtype) -> Tensor:
    outputs = []
    for tokens in zip(inputs.q, inputs.k, inputs.v, strict=True):
        q, k, v = (x.to(dtype) for x in tokens)
        o, next_state = lightning_attention_step(q, k, v, inputs.log_decay, state, impl="eager")
        assert next_state is not None
        state = next_state
        outputs.append(o)
    return torch.stack(outputs)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None) -> Tensor:
    positions = torch.arange(len(k), device=k.device)
    asking = positions if tokens is None else tokens
    scores = q[asking] @ k.T * k.shape[-1] ** -0.5
    scores = scores.masked_fill(positions > asking[:, None], float("-inf"))
    return scores.softmax(-1) @ v


def _ends(count: int) -> tuple[int, ...]:
    return tuple(sorted({0, count - 1}))


def _first_middle_last(count: int) -> tuple[int, ...]:
    return tuple(sorted({0, count // 2, count - 1}))
