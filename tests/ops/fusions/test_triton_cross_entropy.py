"""Cross-entropy's kernel: the error rule across chunks and blocks, ignored tokens, compiled."""

import pytest
import torch
from kernel_device import DEVICE, DTYPES, GPU_UNLESS_INTERPRETED, INTERPRETED, LOW_DTYPES
from kernel_statements import check_compiled, check_kernel, check_op, random, with_grads
from torch import Tensor

from sevenfold.ops import IGNORED_LABEL
from sevenfold.ops.cross_entropy import reference, triton_cross_entropy
from sevenfold.ops.testing import poisoned_allocations

pytestmark = GPU_UNLESS_INTERPRETED
SIZES = [(1, 4, 3), (9, 11, 6), (8, 8, 8)]
if not INTERPRETED:
    SIZES += [(300, 1000, 64), (257, 32001, 96), (130, 4096, 128)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_cross_entropy, "_CHUNK_ELEMENTS", 44 if INTERPRETED else 2**21)
    monkeypatch.setattr(triton_cross_entropy, "_MAX_BLOCK", 4 if INTERPRETED else 4096)


def inputs(T: int, V: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = random(T, D, dtype=dtype), random(V, D, dtype=dtype, seed=1) / D**0.5
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(V, (T,), generator=generator)
    labels[::3] = IGNORED_LABEL
    labels[-1] = V - 1
    return hidden, weight, labels.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "V", "D"), SIZES)
def test_error_rule_across_chunks_and_blocks(T: int, V: int, D: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(T, V, D, dtype)
    check_kernel(
        lambda h, w: triton_cross_entropy.forward(h, w, labels),
        lambda h, w: reference.forward(h, w, labels),
        [hidden, weight],
        [torch.tensor(0.375, device=DEVICE)],
    )


@pytest.mark.parametrize("T", [0, 5])
def test_all_ignored(T: int) -> None:
    hidden, weight = random(T, 6), random(11, 6, seed=1)
    labels = torch.full((T,), IGNORED_LABEL, device=DEVICE)
    found = with_grads(
        lambda h, w: triton_cross_entropy.forward(h, w, labels),
        [hidden, weight],
        [torch.ones((), device=DEVICE)],
    )
    assert found[0] == 0
    assert not any(bool(grad.any()) for grad in found[1:])


@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)])
def test_only_the_wanted_gradients(wants: tuple[bool, bool]) -> None:
    hidden, weight, labels = inputs(9, 11, 6, torch.float32)
    dy = torch.ones((), device=DEVICE)
    run = triton_cross_entropy.forward
    loss, *both = with_grads(lambda h, w: run(h, w, labels), [hidden, weight], [dy])
    found = run(hidden.requires_grad_(wants[0]), weight.requires_grad_(wants[1]), labels)
    assert torch.equal(found.detach(), loss)
    assert found.requires_grad == any(wants)
    if any(wants):
        found.backward()
    for leaf, wanted, expected in zip((hidden, weight), wants, both, strict=True):
        assert torch.equal(leaf.grad, expected) if wanted else leaf.grad is None


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1.0], [-1.0]], device=DEVICE)
    weight = torch.tensor([[1e4], [-1e4]], device=DEVICE)
    labels = torch.tensor([0, 0], device=DEVICE)
    one = torch.ones((), device=DEVICE)
    found = with_grads(
        lambda h, w: triton_cross_entropy.forward(h, w, labels), [hidden, weight], [one]
    )
    assert found[0] == 2e4
    assert all(bool(grad.isfinite().all()) for grad in found[1:])


def test_a_label_beyond_the_vocabulary_makes_the_loss_nan() -> None:
    hidden, weight, labels = inputs(9, 11, 6, torch.float32)
    labels[-1] = 11
    assert bool(triton_cross_entropy.forward(hidden, weight, labels).isnan())


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_nothing_is_read_unwritten_and_every_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(9, 11, 6, dtype)
    dy = torch.ones((), device=DEVICE)

    def run() -> list[Tensor]:
        forward = triton_cross_entropy.forward
        return with_grads(lambda h, w: forward(h, w, labels), [hidden, weight], [dy])

    expected = run()
    with poisoned_allocations():
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("vocab_size", "tokens"),
    [(32_000, 4096), (200_064, 640), (2**20, 128), (2**21, 64), (2**28, 1)],
)
def test_a_chunk_is_whole_tiles_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int, tokens: int
) -> None:
    monkeypatch.undo()
    assert triton_cross_entropy.chunk_tokens(vocab_size) == tokens


@pytest.mark.skipif(INTERPRETED, reason="slow: test_triton_activations compiles there")
@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore::DeprecationWarning")  # Inductor's
def test_compiles_whole() -> None:
    hidden, weight, labels = inputs(30, 100, 16, LOW_DTYPES[0])
    dy = torch.ones((), device=DEVICE)
    forward = triton_cross_entropy.forward
    check_compiled(lambda h, w: forward(h, w, labels), [hidden, weight], [dy])


def test_opcheck() -> None:
    hidden, weight, labels = inputs(9, 11, 6, torch.float32)
    op = triton_cross_entropy.linear_cross_entropy
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    check_op(op, (*leaves, labels, True, True))
