"""Padding taken out of a batch and put back, and a mixture of experts without it."""

import numpy as np
import pytest
import torch
from model_cases import tiny_config

from sevenfold.models import MoEConfig
from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.models.padding import Padding

MASKS = {
    "behind": [0, 0, 0, 0, 1, 1],
    "before": [1, 1, 0, 0, 0, 0],
    "between": [0, 0, 1, 1, 0, 0],
    "twice": [0, 1, 0, 0, 1, 1],
    "all": [1, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_what_is_taken_out_is_put_back_as_zeros(mask: list[int]) -> None:
    is_padding = np.array(mask, dtype=bool)
    padding = Padding.at(is_padding.reshape(2, 3))
    assert padding is not None
    x, is_token = torch.randn(6, 2), torch.from_numpy(~is_padding)
    assert torch.equal(padding.take_out(x), x[is_token])
    assert torch.equal(padding.put_back(x[is_token]), x * is_token[:, None])
    for num_stretches in (1, 2, 3):
        counts = (~is_padding).reshape(num_stretches, -1).sum(1)
        assert padding.tokens_of(num_stretches) == tuple(counts)


def test_no_padding_is_none_and_padding_behind_is_not_copied() -> None:
    assert Padding.at(np.zeros((2, 3), dtype=bool)) is None
    x = torch.randn(6, 2)
    assert Padding((4, 2)).take_out(x).data_ptr() == x.data_ptr()


def mixture() -> MixtureOfExperts:
    moe = MoEConfig(num_local_experts=3, capacity_factor=0.5, shared_intermediate_size=7)
    layer = MixtureOfExperts(tiny_config(moe=moe), moe).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mixture_gives_what_it_gives_without_padding(mask: list[int]) -> None:
    """Also where there is nothing else: every weight takes a gradient, of zero."""
    layer, is_token = mixture(), ~torch.tensor(mask, dtype=torch.bool)
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    y, counts = layer(x, Padding.at(np.array(mask, dtype=bool)))
    assert counts is not None
    assert (y[:, ~is_token] == 0).all()
    assert counts.num_choices == 2 * is_token.sum()
    found = torch.autograd.grad(y.sum() + counts.totals.sum(), list(layer.parameters()))
    if not is_token.any():
        assert not any(gradient.any() for gradient in found)
        assert (counts.totals.sum().item(), counts.kept.sum().item()) == (0, 0)
        return
    plain, plain_counts = layer(x[:, is_token])
    assert plain_counts is not None
    assert torch.equal(y[:, is_token], plain)
    assert all(torch.equal(a, b) for a, b in zip(counts[:2], plain_counts[:2], strict=True))
    exact = torch.autograd.grad(plain.sum() + plain_counts.totals.sum(), list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
