"""States in fewer bits written and read in plain PyTorch: gathered, rounded, put back."""

from torch import Tensor

from sevenfold.ops.low_precision.fp16 import from_scaled_fp16, to_scaled_fp16
from sevenfold.ops.low_precision.int8 import dequantise_rows, quantise_rows
from sevenfold.ops.low_precision.noise import Noise, noise_bits


def encode(
    states: Tensor,
    slots: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    heads: Tensor | None,
    into: Tensor,
    key: Tensor | None,
    position: Tensor | None,
    layer: int,
) -> None:
    """Round states into codes and scale; arguments as the public operator's, taken apart."""
    own = states[slots] if heads is None else states[slots[:, None], heads]
    if scale is None:
        codes[into] = own.to(codes.dtype)
    elif scale.dim() == 3:
        codes[into], scale[into] = quantise_rows(own)
    else:
        bits = None
        if key is not None and position is not None:
            bits = noise_bits(Noise(key, position, layer), tuple(states.shape[1:]))
            bits = bits if heads is None else bits[:, heads]
        codes[into], scale[into] = to_scaled_fp16(own, bits)


def decode(
    codes: Tensor,
    scale: Tensor | None,
    heads: Tensor | None,
    slots: Tensor,
    states: Tensor,
    into: Tensor,
) -> None:
    """Write what codes and scale hold into states; arguments as the public operator's."""
    own = codes[slots]
    if scale is None:
        own = own.float()
    elif scale.dim() == 3:
        own = dequantise_rows(own, scale[slots])
    else:
        own = from_scaled_fp16(own, scale[slots])
    if heads is None:
        states[into] = own
    else:
        states[into[:, None], heads] = own
