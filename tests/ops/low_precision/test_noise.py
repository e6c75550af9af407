"""Random bits by counter: repeatable, independent of the batch, without visible bias."""

import torch

from sevenfold.ops import Noise, noise_bits

SHAPE = (2, 8, 16)


def bits(keys: list[int], positions: list[int], layer: int = 0) -> torch.Tensor:
    return noise_bits(Noise(torch.tensor(keys), torch.tensor(positions), layer), SHAPE)


def test_a_sequence_has_its_bits_in_any_batch() -> None:
    together = bits([5, -(2**63), 5, 2**40], [100, 7, 101, 0])
    for n, (key, position) in enumerate([(5, 100), (-(2**63), 7), (5, 101), (2**40, 0)]):
        assert torch.equal(bits([key], [position])[0], together[n])
    assert ((together >= 0) & (together < 2**32)).all()


def test_bits_differ_by_key_position_and_layer() -> None:
    base = bits([5], [100])
    for other in (
        bits([6], [100]),
        bits([5 + 2**32], [100]),
        bits([5], [101]),
        bits([5], [100], layer=1),
    ):
        same = (base == other).float().mean()
        assert same <= 0.02
    assert len(base.unique()) >= 0.99 * base.numel()


def test_every_bit_is_set_half_of_the_time() -> None:
    drawn = bits(list(range(64)), list(range(1000, 1064)), layer=2).flatten()
    share = torch.stack([(drawn >> bit & 1).double().mean() for bit in range(32)])
    # Five standard errors of a fair coin.
    assert ((share - 0.5).abs() <= 2.5 / len(drawn) ** 0.5).all()
    # And neighbours do not follow one another.
    low = (drawn & 0x1FFF).double() / 0x2000 - 0.5
    assert abs(float((low[1:] * low[:-1]).mean())) * 12 <= 5 / len(drawn) ** 0.5
