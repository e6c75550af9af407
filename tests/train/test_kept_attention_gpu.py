"""On a GPU a recomputed block keeps what softmax attention gave, and gradients stay the same."""

import pytest
import torch
from test_train_transform import FOUR
from torch import Tensor
from train_helpers import tiny_model

from sevenfold.models import Batch
from sevenfold.ops import attention_block
from sevenfold.ops.attention import kept
from sevenfold.ops.testing import check_error
from sevenfold.train.transform import recompute_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*has no tuning")]
WIDTHS = {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDTHS |= {"intermediate_size": 64, "rotary_dim": 32, "max_position_embeddings": 4096}


def gradients(dtype: torch.dtype, lengths: tuple[int, ...], *, recompute: bool) -> list[Tensor]:
    """Of the mean of the last vectors, to every parameter."""
    model = tiny_model(**FOUR, **WIDTHS).cuda().to(dtype)
    if recompute:
        recompute_blocks(model, 1)
    total = sum(lengths)
    ids = torch.arange(total, device="cuda")[None] % model.config.vocab_size
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    batch = Batch(lengths, (0,) * len(lengths), positions, borders)
    hidden = model.train().hidden(ids, batch, None).hidden
    (hidden.float() if dtype is not torch.float64 else hidden).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("lengths", [(2048,), (1024, 1024), (700, 1, 323)])
def test_gradients_are_those_of_blocks_that_keep_all(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def told(*arguments, **named):
        runs.append(arguments[0].shape)
        return attention_block(*arguments, **named)

    monkeypatch.setattr(kept, "attention_block", told)
    found = gradients(torch.bfloat16, lengths, recompute=True)
    assert len(runs) == 2  # softmax layers
    plain = gradients(torch.bfloat16, lengths, recompute=False)
    exact = gradients(torch.float64, lengths, recompute=False)
    for n, (ours, eager, best) in enumerate(zip(found, plain, exact, strict=True)):
        check_error(f"gradient {n}", ours, eager, best)
