"""The fixed decays: hand-worked values, the ALiBi rule, the layer factor, the horizons."""

import math
import re

import pytest
import torch

from sevenfold.ops import head_slopes, layer_log_decay


def recursive_slopes(num_heads: int) -> list[float]:
    """The rule as the ALiBi paper's code states it, down to the next power of two."""
    if num_heads & (num_heads - 1) == 0:
        start = 2 ** (-(2 ** -(math.log2(num_heads) - 3)))
        return [start * start**i for i in range(num_heads)]
    lower = 1 << (num_heads.bit_length() - 1)
    return recursive_slopes(lower) + recursive_slopes(2 * lower)[0::2][: num_heads - lower]


def printed(numbers: list[float]) -> list[str]:
    return [f"{x:.12g}" for x in numbers]


def test_64_heads_step_by_an_eighth_of_an_octave() -> None:
    slopes = head_slopes(64)
    assert slopes == [2 ** (-h / 8) for h in range(1, 65)]
    assert f"{slopes[0]:.4f}" == "0.9170"
    assert slopes[-1] == 0.00390625


def test_8_heads_and_1_head() -> None:
    assert head_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert head_slopes(1) == [1 / 256]


def test_6_heads_take_every_second_slope_of_the_next_power() -> None:
    assert head_slopes(6) == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 7, 8, 12, 16, 20, 48, 64])
def test_slopes_follow_the_recursive_statement(num_heads: int) -> None:
    assert printed(head_slopes(num_heads)) == printed(recursive_slopes(num_heads))


@pytest.mark.parametrize("num_heads", [0, -1])
def test_no_heads(num_heads: int) -> None:
    with pytest.raises(ValueError, match=f"num_heads must be at least 1, got {num_heads}"):
        head_slopes(num_heads)


def test_layer_factor_runs_from_one_to_a_hundred_thousandth() -> None:
    first, last = layer_log_decay(8, 0, 80), layer_log_decay(8, 79, 80)
    slopes = torch.tensor(head_slopes(8), dtype=torch.float64)
    assert torch.equal(first, (-slopes * (1 + 1e-5)).float())
    assert torch.equal(last, torch.tensor([-s * (1 - 79 / 79 + 1e-5) for s in head_slopes(8)]))
    assert bool((layer_log_decay(64, 79, 80) < 0).all())


@pytest.mark.parametrize("layer", [0, 1, 39, 78])
def test_layer_factor_uses_the_index_among_all_layers(layer: int) -> None:
    expected = [-s * (1 - layer / 79 + 1e-5) for s in head_slopes(64)]
    assert torch.equal(layer_log_decay(64, layer, 80), torch.tensor(expected))


def test_a_model_of_one_layer() -> None:
    assert torch.equal(layer_log_decay(1, 0, 1), torch.tensor([-(1 + 1e-5) / 256]))


@pytest.mark.parametrize(("layer", "num_layers"), [(-1, 4), (4, 4), (0, 0)])
def test_layer_outside_the_model(layer: int, num_layers: int) -> None:
    message = f"layer must lie in 0 to {num_layers - 1}, got {layer}"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer_log_decay(8, layer, num_layers)


# Tokens after which a head has forgotten to 1/e: heads 1, 16, 32, 48, 64 of MiniMax-Text-01.
HORIZONS = {
    0: ["1.09", "4.0", "16", "64", "256"],
    16: ["1.37", "5.0", "20", "80", "321"],
    40: ["2.2", "8.1", "32", "130", "519"],
    70: ["9.6", "35", "140", "562", "2247"],
    78: ["86", "316", "1263", "5052", "20208"],
}


@pytest.mark.parametrize("layer", HORIZONS)
def test_horizons_of_the_released_model(layer: int) -> None:
    log_decay = layer_log_decay(64, layer, 80).double()
    for head, text in zip([1, 16, 32, 48, 64], HORIZONS[layer], strict=True):
        digits = len(text.partition(".")[2])
        assert f"{-1 / log_decay[head - 1].item():.{digits}f}" == text


def test_values_lie_on_the_cpu_even_on_the_meta_device() -> None:
    with torch.device("meta"):
        log_decay = layer_log_decay(8, 3, 8)
    assert log_decay.device.type == "cpu"
    assert torch.equal(log_decay, layer_log_decay(8, 3, 8))
    assert (log_decay.dtype, log_decay.requires_grad) == (torch.float32, False)
