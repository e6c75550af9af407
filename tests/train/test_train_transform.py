from functools import partial

import pytest
import torch
from train_helpers import MOE, HandLoader, hand_sample, tiny_model

from sevenfold.models.layers import RMSNorm
from sevenfold.ops import attention_block
from sevenfold.ops.attention import kept
from sevenfold.ops.testing import check_error
from sevenfold.train import kept_attention
from sevenfold.train.batch import read_step
from sevenfold.train.by_pieces import by_pieces
from sevenfold.train.kept_attention import KeptAttention
from sevenfold.train.step import forward_backward
from sevenfold.train.transform import compile_parts, narrow_stream, recompute_blocks

FOUR = {"layer_types": ["linear_attention", "full_attention"] * 2}
STEP = read_step(
    HandLoader([hand_sample(0), hand_sample(1, lengths=(5, 11), num_ignored=2)]),
    0,
    2,
    micro_batch_rows=1,
    device=torch.device("cpu"),
)


def results(model, autocast=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    losses = forward_backward(model.train(), STEP, autocast=autocast)
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("every_layers", [1, 2, 4])
@pytest.mark.parametrize("autocast", [None, "bf16"])
@pytest.mark.parametrize("moe", [MOE, None])
def test_recomputation_changes_no_bit(every_layers: int, autocast: str | None, moe: dict) -> None:
    plain, recomputed = (tiny_model(moe=moe, **FOUR) for _ in range(2))
    recompute_blocks(recomputed, every_layers)
    losses, gradients = results(plain, autocast)
    losses_again, gradients_again = results(recomputed, autocast)
    assert torch.equal(losses, losses_again)
    assert [n for n, g in gradients.items() if not torch.equal(g, gradients_again[n])] == []


@pytest.mark.parametrize(
    ("every_layers", "runs"), [(1, [4] * 4), (2, [4, 2, 4, 2]), (4, [4, 2, 2, 2])]
)
def test_every_kth_block_runs_again_in_the_backward(every_layers: int, runs: list[int]) -> None:
    model = tiny_model(**FOUR)
    counts = [0] * 4
    for i, block in enumerate(model.layers):
        block.input_layernorm.register_forward_hook(
            lambda *_, i=i: counts.__setitem__(i, counts[i] + 1)
        )
    recompute_blocks(model, every_layers)
    results(model)
    assert counts == runs  # two micro-batches


@pytest.mark.parametrize("piece_tokens", [1, 5, 16])
@pytest.mark.parametrize("autocast", [None, "bf16"])
@pytest.mark.parametrize("norm_placement", ["post_norm", "pre_norm"])
def test_a_feed_forward_by_pieces_is_the_same(
    piece_tokens: int, autocast: str | None, norm_placement: str
) -> None:
    changes = {"norm_placement": norm_placement, **FOUR}
    exact_losses, exact = results(tiny_model(dtype=torch.float64, **changes))
    plain, pieces = tiny_model(**changes), tiny_model(**changes)
    recompute_blocks(pieces, 1)
    for block in pieces.layers:
        block.feed_dense = partial(by_pieces, block.mlp, piece_tokens=piece_tokens)
    losses, gradients = results(plain, autocast)
    losses_again, gradients_again = results(pieces, autocast)
    dtype = torch.float32 if autocast is None else torch.bfloat16
    check_error("loss", losses_again[:1], losses[:1].to(dtype), exact_losses[:1])
    for name, gradient in gradients.items():
        check_error(name, gradients_again[name], gradient.to(dtype), exact[name])


@pytest.mark.parametrize("autocast", [None, "bf16"])
def test_what_softmax_attention_gave_is_kept(
    autocast: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def told(*arguments, **named):
        runs.append(arguments[0].shape)
        return attention_block(*arguments, **named)

    exact_losses, exact = results(tiny_model(dtype=torch.float64, **FOUR))
    losses, gradients = results(tiny_model(**FOUR), autocast)
    model = tiny_model(**FOUR)
    recompute_blocks(model, 1)
    assert [isinstance(getattr(b.self_attn, "attend", None), KeptAttention) for b in model.layers] \
        == [False, True] * 2  # fmt: skip
    monkeypatch.setattr(kept_attention, "suits_keeping", lambda *_: True)
    monkeypatch.setattr(kept, "attention_block", told)
    losses_again, gradients_again = results(model, autocast)
    assert len(runs) == 2 * 2  # layers, micro-batches
    dtype = torch.float32 if autocast is None else torch.bfloat16
    check_error("loss", losses_again[:1], losses[:1].to(dtype), exact_losses[:1])
    for name, gradient in gradients.items():
        check_error(name, gradients_again[name], gradient.to(dtype), exact[name])
    with torch.no_grad():
        model.eval()(STEP.micro_batches[0].input_ids)
    assert len(runs) == 2 * 2  # nothing is kept where nothing goes backward


def test_a_recomputed_feed_forward_runs_twice_on_pieces_of_its_tokens() -> None:
    model, shapes = tiny_model(**FOUR), []
    recompute_blocks(model, 1)
    first = model.layers[0]
    first.feed_dense = partial(by_pieces, first.mlp, piece_tokens=6)
    first.mlp.register_forward_hook(lambda _module, args, _y: shapes.append(args[0].shape[0]))
    results(model)
    assert shapes == [6, 6, 4, 6, 6, 4] * 2  # two micro-batches of 16 tokens


def test_a_feed_forward_by_pieces_needs_no_gradient_and_gives_none_to_what_wants_none() -> None:
    feed, x = tiny_model(**FOUR).layers[0].mlp, torch.randn(2, 3, 16)
    assert torch.equal(by_pieces(feed, x, piece_tokens=4), feed(x))
    x.requires_grad_()
    with torch.no_grad():
        assert not by_pieces(feed, x).requires_grad
    feed.down_proj.weight.requires_grad_(False)
    by_pieces(feed, x, piece_tokens=4).sum().backward()
    assert feed.down_proj.weight.grad is None
    found = feed.gate_up_proj.weight.grad
    feed.gate_up_proj.weight.grad = None
    feed(x).sum().backward()
    torch.testing.assert_close(found, feed.gate_up_proj.weight.grad)


def test_names_of_parameters_stay() -> None:
    model = tiny_model(**FOUR)
    names = list(model.state_dict())
    recompute_blocks(model, 1)
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo hides its own
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's of PyTorch
@pytest.mark.parametrize(("autocast", "num_feed_forwards"), [(None, 0), ("bf16", 4)])
def test_compiled_parts_keep_loss_and_gradients(
    autocast: str | None, num_feed_forwards: int
) -> None:
    exact_losses, exact = results(tiny_model(dtype=torch.float64, **FOUR))
    plain, compiled = tiny_model(**FOUR), tiny_model(**FOUR)
    num_norms = sum(isinstance(m, RMSNorm) for m in compiled.modules())
    assert compile_parts(compiled, autocast=autocast) == num_norms + num_feed_forwards
    losses, gradients = results(plain, autocast)
    losses_again, gradients_again = results(compiled, autocast)
    dtype = torch.float32 if autocast is None else torch.bfloat16
    check_error("loss", losses_again[:1], losses[:1].to(dtype), exact_losses[:1])
    for name, gradient in gradients.items():
        check_error(name, gradients_again[name], gradient.to(dtype), exact[name])


@pytest.mark.parametrize("norm_placement", ["post_norm", "pre_norm"])
def test_a_bf16_stream_is_bf16_from_embedding_to_head(norm_placement: str) -> None:
    changes = {"moe": MOE, "norm_placement": norm_placement, **FOUR}
    exact_losses, exact = results(tiny_model(dtype=torch.float64, **changes))
    narrow = tiny_model(**changes)
    narrow_stream(narrow)
    dtypes = set()
    for module in (*narrow.layers, narrow.norm):
        module.register_forward_pre_hook(lambda _module, args: dtypes.add(args[0].dtype))
    losses, gradients = results(narrow, "bf16")
    assert dtypes == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    # What bf16 changes in a model all of it: the honest error of this dtype.
    halved = tiny_model(dtype=torch.bfloat16, **changes)
    bf16_losses, bf16 = results(halved)
    check_error("loss", losses[:1], bf16_losses[:1].to(torch.bfloat16), exact_losses[:1])
    for name, gradient in gradients.items():
        check_error(name, gradient, bf16[name], exact[name])
