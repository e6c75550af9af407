"""Every mixer: its formula, packed equals separate, no document sees another, the state."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sevenfold.models import Batch, KVState, ModelConfig
from sevenfold.models.layers import rotate, rotation
from sevenfold.models.mixers import LightningAttention, SoftmaxAttention, build_mixer
from sevenfold.ops import layer_log_decay
from sevenfold.ops.testing import check_error

CPU = torch.device("cpu")
# After a colon, the groups of the norm.
KINDS = ["linear_attention", "linear_attention:2", "full_attention", "sliding_attention"]
DTYPES = [torch.float32, torch.bfloat16]
H, G, D, WIDTH, WINDOW = 2, 1, 6, 8, 3
LENGTHS = [70, 1, 0, 5, 66]


def build(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    kind, _, groups = kind.partition(":")
    config = ModelConfig(
        vocab_size=19,
        hidden_size=WIDTH,
        layer_types=(kind, kind),
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=D,
        intermediate_size=10,
        rotary_dim=4,
        sliding_window=WINDOW if kind == "sliding_attention" else None,
        linear_attn_norm_groups=int(groups or 1),
    )
    mixer = build_mixer(config, 0)
    generator = torch.Generator().manual_seed(4)
    for parameter in mixer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).bfloat16() / 2
    return mixer.to(dtype).requires_grad_(False)


def inputs(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, WIDTH, generator=generator).bfloat16().to(dtype)


def run(mixer: torch.nn.Module, x: Tensor, lengths: list[int]) -> Tensor:
    return mixer(x, Batch.packed(lengths, device=CPU), None)[0]


def separately(mixer: torch.nn.Module, x: Tensor, lengths: list[int]) -> Tensor:
    """Each document by itself, in a row of its own."""
    parts = [part for part in x.split(lengths, dim=1) if part.shape[1]]
    rows = [mixer(part, Batch.rows(*part.shape[:2], device=CPU), None)[0] for part in parts]
    return torch.cat(rows, dim=1)


def literal(kind: str, mixer: torch.nn.Module, x: Tensor) -> Tensor:
    """The mixer's formula for one row, with dense attention matrices."""
    T = x.shape[1]
    age = torch.arange(T)[:, None] - torch.arange(T)
    kind, _, groups = kind.partition(":")
    if kind == "linear_attention":
        qkv = F.silu(x[0] @ mixer.qkv_proj.weight.T).view(T, H, 3, D)
        q, k, v = qkv.unbind(2)
        rate = layer_log_decay(H, 0, 2).to(x.dtype)[:, None, None]
        weights = torch.where(age >= 0, torch.exp(rate * age.clamp(min=0)), 0)
        o = torch.einsum("hij,ihd,jhd,jhe->ihe", weights, q, k, v).reshape(T, H * D)
        squares = o.view(T, int(groups or 1), -1).square().mean(-1, keepdim=True)
        normed = o.view(T, int(groups or 1), -1) / (squares + 1e-6).sqrt()
        normed = normed.reshape(T, -1) * mixer.norm.weight
        return ((normed * torch.sigmoid(x[0] @ mixer.output_gate.weight.T)) @ out(mixer).T)[None]
    heads = (x[0] @ w.T for w in (mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight))
    q, k, v = (y.view(1, T, -1, D) for y in heads)
    turns = rotation(torch.arange(T)[None], 4, 10_000.0, dtype=x.dtype)
    q, k = rotate(q, turns), rotate(k, turns)
    hidden = (age < 0) | (age >= (WINDOW if kind == "sliding_attention" else T))
    scores = torch.einsum("ihd,jgd->hij", q[0], k[0]) / D**0.5
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    o = torch.einsum("hij,jgd->ihd", p, v[0]).reshape(T, H * D)
    return (o @ out(mixer).T)[None]


def out(mixer: torch.nn.Module) -> Tensor:
    return (mixer.out_proj if hasattr(mixer, "out_proj") else mixer.o_proj).weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_follows_the_formula(kind: str, dtype: torch.dtype) -> None:
    x = inputs(1, 70, dtype=dtype)
    mixer, exactly = build(kind, dtype), build(kind, torch.float64)
    exact = literal(kind, exactly, x.double())
    found = mixer(x, Batch.rows(1, 70, device=CPU), None)[0]
    check_error(kind, found, literal(kind, mixer, x), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate(kind: str, dtype: torch.dtype) -> None:
    x = inputs(1, sum(LENGTHS), dtype=dtype)
    mixer, exactly = build(kind, dtype), build(kind, torch.float64)
    exact = separately(exactly, x.double(), LENGTHS)
    check_error(kind, run(mixer, x, LENGTHS), separately(mixer, x, LENGTHS), exact)
    check_error(kind, run(exactly, x.double(), LENGTHS).to(dtype), exact.to(dtype), exact)


@pytest.mark.parametrize("changed", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_document_never_sees_another(kind: str, dtype: torch.dtype, changed: int) -> None:
    mixer, x = build(kind, dtype), inputs(1, sum(LENGTHS), dtype=dtype)
    other = x.clone()
    other.split(LENGTHS, dim=1)[changed].mul_(-3).add_(1)
    before, after = (run(mixer, y, LENGTHS).split(LENGTHS, dim=1) for y in (x, other))
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [n != changed for n in range(len(LENGTHS))]


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_crosses_documents(kind: str) -> None:
    mixer, x = build(kind, torch.float32), inputs(1, 9, dtype=torch.float32).requires_grad_()
    y = run(mixer, x, [3, 4, 2])
    (grad,) = torch.autograd.grad(y[:, 3:7].square().sum(), x)
    assert bool((grad[:, 3:7] != 0).all())
    assert not grad[:, :3].any()
    assert not grad[:, 7:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_leave_earlier_ones_alone(kind: str) -> None:
    mixer, x = build(kind, torch.float32), inputs(1, 70, dtype=torch.float32)
    other = x.clone()
    other[:, 40:] = 5.0
    before, after = (run(mixer, y, [70]) for y in (x, other))
    assert torch.equal(before[:, :40], after[:, :40])
    assert not bool((before[:, 40:] == after[:, 40:]).all())


def test_a_window_forgets_what_has_left_it() -> None:
    mixer, x = build("sliding_attention", torch.float32), inputs(1, 9, dtype=torch.float32)
    other = x.clone()
    other[:, 4] = 5.0
    before, after = (run(mixer, y, [9])[0] for y in (x, other))
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True] * 4 + [False] * WINDOW + [True] * 2


def test_the_type_of_a_layer_chooses_its_mixer() -> None:
    linear, grouped, full, sliding = (build(kind, torch.float32) for kind in KINDS)
    assert isinstance(linear, LightningAttention)
    assert (linear.norm_groups, grouped.norm_groups) == (1, 2)
    assert isinstance(full, SoftmaxAttention)
    assert (full.window, sliding.window) == (None, WINDOW)


def test_the_decay_follows_the_index_of_the_layer() -> None:
    config = ModelConfig(
        vocab_size=19,
        hidden_size=WIDTH,
        layer_types=("full_attention", "linear_attention", "linear_attention"),
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=D,
        intermediate_size=10,
        rotary_dim=4,
    )
    for layer in (1, 2):
        decay = build_mixer(config, layer).log_decay
        assert torch.equal(decay, layer_log_decay(4, layer, 3))
        slope = 2.0**-2 * (1 - layer / 2 + 1e-5)
        assert torch.equal(decay[:1], torch.tensor([-slope]))


def test_full_attention_needs_room() -> None:
    mixer = build("full_attention", torch.float32)
    storage = torch.zeros(1, 4, G, D)
    batch = Batch.rows(1, 2, past=[3], device=CPU)
    with pytest.raises(ValueError, match="state must have room for 5 tokens, got 4"):
        mixer(inputs(1, 2, dtype=torch.float32), batch, KVState(storage, storage.clone()))
