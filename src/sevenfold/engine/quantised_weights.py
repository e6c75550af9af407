"""Weights in 8 bits: a plain model's matrices exchanged for int8 or fp8 ones, quantised as read.

One scale for each output channel, symmetric. With int8 activations stay as they are; with fp8 they
are rounded to fp8 row by row where they enter a product. Embedding, head, norms, routers and a
shared expert's share keep the model's precision.

Source: the published recipes for MiniMax-Text-01, by optimum-quanto (all matrices but head,
embedding, routers and coefficients) and by vLLM 0.8 (experts_int8).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sevenfold.config import ConfigError
from sevenfold.models import HybridModel
from sevenfold.models.accounting import WeightFormat
from sevenfold.models.checkpoint import load_model
from sevenfold.models.feed_forward import Experts, MixtureOfExperts
from sevenfold.models.layers import Linear
from sevenfold.ops import (
    Dispatch,
    Fp8Rows,
    Int8Rows,
    check_fp8_device,
    fp8_linear,
    fp8_mixture,
    int8_linear,
    int8_mixture,
    quantise_rows,
    quantise_rows_fp8,
)

# QuantisedLinear.write: whole rows, where they begin, and which of their columns are kept.
WriteQuantised = Callable[..., None]
_ELEMENTS_AT_ONCE = 1 << 20  # quantised in one go: bounds what lies in memory beside the model
_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class QuantisedLinear(nn.Module):
    """y = x (codes * scale)^T, codes [N, K] int8 or fp8 and scale [N] fp32; fp8 rounds x too."""

    codes: Tensor
    scale: Tensor

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("codes", torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer("scale", torch.empty(shape[:-1], device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight; x [..., K]."""
        product = int8_linear if self.codes.dtype is torch.int8 else fp8_linear
        return product(x, self.codes, self.scale)

    def write(self, values: Tensor, start: int, columns: slice = slice(None)) -> None:
        """Quantise stored rows of the weight into their place, from that element on.

        A rank that holds some columns alone takes their codes under the whole row's scale: so the
        codes of all ranks are those of one process.
        """
        K = values.shape[-1]
        quantise = quantise_rows if self.codes.dtype is torch.int8 else quantise_rows_fp8
        codes, scale = self.codes.view(-1, self.codes.shape[-1]), self.scale.view(-1)
        at = start // K
        for part in values.reshape(-1, K).split(max(1, _ELEMENTS_AT_ONCE // K)):
            held = quantise(part.to(codes.device))
            span = slice(at, at := at + len(part))
            codes[span], scale[span] = held.codes[:, columns], held.scale


class QuantisedExperts(nn.Module):
    """E SwiGLU experts, matrices as QuantisedLinear holds one: codes [E, N, K], scale [E, N]."""

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (
            QuantisedLinear(weight.shape, dtype, weight.device)
            for weight in (experts.gate_up_proj, experts.down_proj)
        )

    def forward(self, x: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        """Send x [T, D] through its experts, and sum by weights [T, k]."""
        first, second = ((one.codes, one.scale) for one in (self.gate_up_proj, self.down_proj))
        if self.gate_up_proj.codes.dtype is torch.int8:
            return int8_mixture(x, weights, Int8Rows(*first), Int8Rows(*second), dispatch)
        return fp8_mixture(x, weights, Fp8Rows(*first), Fp8Rows(*second), dispatch)


def load_quantised_model(
    path: Path | str,
    weights: WeightFormat,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> HybridModel:
    """Load a checkpoint, quantising each tensor as it is read.

    Never more than the quantised model, one stored tensor and a few blocks of 1M elements lie in
    memory: the model in its own precision never exists.

    Args:
        path: the folder, in any of the three formats.
        weights: "int8" or "fp8" for all matrices of the layers, "int8-experts" or "fp8-experts" for
            the experts only.
        device: where the model shall be.
        dtype: of what is not quantised, and of the activations; None keeps the file's.

    Returns:
        The model in evaluation mode.

    Raises:
        ConfigError: experts only are asked for of a model without experts.
        UnsupportedError: fp8 is asked for on a GPU that has none; or as load_model.
        CheckpointError: as load_model.
    """
    check_weights_device(weights, torch.device(device))
    return load_model(
        path, device=device, dtype=dtype, exchange=lambda model: exchange_weights(model, weights)
    )


def check_weights_device(weights: WeightFormat, device: torch.device) -> None:
    """Raise UnsupportedError where weights are to be fp8 on a GPU that has none."""
    if weights.startswith("fp8"):
        check_fp8_device(device)


def exchange_weights(model: HybridModel, weights: WeightFormat) -> dict[str, WriteQuantised]:
    """Exchange a model's matrices for quantised ones of the same shapes, uninitialised.

    Args:
        model: plain, or divided by narrow_model; the meta device will do.
        weights: which matrices.

    Returns:
        For each parameter that is gone, by its name, QuantisedLinear.write of its place.

    Raises:
        ConfigError: experts only are asked for of a model without experts.
    """
    found = dict(_matrices(model, weights))
    if not found:
        instead = weights.removesuffix("-experts")
        raise ConfigError(
            f"weights must be {instead} for a model without experts, where {weights} has no effect"
        )
    return {name: matrix.write for name, matrix in found.items()}


def _matrices(model: HybridModel, weights: WeightFormat) -> Iterator[tuple[str, QuantisedLinear]]:
    dtype, only_experts = _CODES[weights.removesuffix("-experts")], weights.endswith("-experts")
    for name, module in list(model.layers.named_modules(prefix="layers")):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, Experts):
            experts = QuantisedExperts(module, dtype)
            setattr(model.get_submodule(parent), leaf, experts)
            yield f"{name}.gate_up_proj", experts.gate_up_proj
            yield f"{name}.down_proj", experts.down_proj
        elif isinstance(module, Linear) and not only_experts:
            above = model.get_submodule(parent)
            if isinstance(above, MixtureOfExperts):
                continue  # the shared expert's coefficient
            matrix = QuantisedLinear(module.weight.shape, dtype, module.weight.device)
            setattr(above, leaf, matrix)
            yield f"{name}.weight", matrix
