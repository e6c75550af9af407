"""On a GPU a mixture leaves padding out: odd numbers of rows, and experts without any."""

import numpy as np
import pytest
import torch
from model_cases import tiny_config
from torch import Tensor

from sevenfold.models import MoEConfig
from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.models.padding import Padding
from sevenfold.ops.testing import check_error

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*has no tuning")]
NUM_TOKENS, WIDTH, NUM_EXPERTS = 96, 64, 8
# The last n tokens are padding: 95 and 61 rows, an odd number; 3, so that most experts get none.
NUM_PADDING = [1, 35, 93]


def layer_of(dtype: torch.dtype) -> MixtureOfExperts:
    moe = MoEConfig(num_local_experts=NUM_EXPERTS)
    config = tiny_config(moe=moe, hidden_size=WIDTH, intermediate_size=WIDTH)
    layer = MixtureOfExperts(config, moe).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=WIDTH**-0.5, generator=generator)
    # Rounded once, as x is, so that routers of every dtype choose alike.
    return layer.bfloat16().cuda().to(dtype)


def results(x: Tensor, dtype: torch.dtype, padding: Padding | None) -> dict[str, Tensor]:
    """Output, and gradients of the mean of its squares."""
    layer = layer_of(dtype)
    x = x.to(dtype).clone().requires_grad_()
    y, counts = layer(x, padding)
    assert counts is not None
    num_tokens = x.shape[1] if padding is None else padding.runs[0]
    assert counts.num_choices == counts.kept.sum() == 2 * num_tokens
    y.square().mean().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("num_padding", NUM_PADDING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mixture_gives_what_it_gives_without_padding(
    num_padding: int, dtype: torch.dtype
) -> None:
    x = torch.randn(1, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()
    is_padding = np.arange(NUM_TOKENS) >= NUM_TOKENS - num_padding
    padding = Padding.at(is_padding[None])
    x = x.bfloat16().float()
    found = results(x, dtype, padding)
    exact = results(x.double(), torch.float64, padding)
    assert (found["y"][:, is_padding] == 0).all()
    assert (found["x"][:, is_padding] == 0).all()
    plain = results(x[:, ~is_padding], dtype, None)
    scale = (~is_padding).mean()  # of the mean, which counts padding
    for name, value in found.items():
        same = value[:, ~is_padding] if name in ("x", "y") else value
        other = plain[name] if name == "y" else plain[name] * scale
        best = exact[name][:, ~is_padding] if name in ("x", "y") else exact[name]
        check_error(name, same, other, best)
