"""int8 weights: a plain model's matrices exchanged for int8 ones, and quantised as they are read.

One scale for each output channel, symmetric; activations stay as they are. Embedding, head, norms,
routers and a shared expert's share keep the model's precision.

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
from sevenfold.models.checkpoint.load import WriteSpan
from sevenfold.models.feed_forward import Experts, MixtureOfExperts
from sevenfold.models.layers import Linear
from sevenfold.ops import Dispatch, Int8Rows, int8_linear, int8_mixture, quantise_rows

_ELEMENTS_AT_ONCE = 1 << 20  # quantised in one go: bounds what lies in memory beside the model


class Int8Linear(nn.Module):
    """y = x (codes * scale)^T, codes [N, K] int8 and scale [N] fp32."""

    codes: Tensor
    scale: Tensor

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("codes", torch.empty(shape, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(shape[:-1], device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight; x [..., K]."""
        return int8_linear(x, self.codes, self.scale)


class Int8Experts(nn.Module):
    """E SwiGLU experts, their matrices as Int8Linear holds one: codes [E, N, K], scale [E, N]."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (
            Int8Linear(weight.shape, weight.device)
            for weight in (experts.gate_up_proj, experts.down_proj)
        )

    def forward(self, x: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        """Send x [T, D] through its experts, and sum by weights [T, k]."""
        gate_up, down = self.gate_up_proj, self.down_proj
        held = (Int8Rows(gate_up.codes, gate_up.scale), Int8Rows(down.codes, down.scale))
        return int8_mixture(x, weights, held[0], held[1], dispatch)


def load_int8_model(
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
        weights: "int8-experts" for the experts only, "int8" for all matrices of the layers.
        device: where the model shall be.
        dtype: of what is not quantised, and of the activations; None keeps the file's.

    Returns:
        The model in evaluation mode.

    Raises:
        ConfigError: "int8-experts" is asked of a model without experts.
        CheckpointError, UnsupportedError: as load_model.
    """
    return load_model(
        path, device=device, dtype=dtype, exchange=lambda model: exchange_weights(model, weights)
    )


def exchange_weights(model: HybridModel, weights: WeightFormat) -> dict[str, WriteSpan]:
    """Exchange a model's matrices for int8 ones of the same shapes, uninitialised.

    Args:
        model: plain; the meta device will do.
        weights: which matrices.

    Returns:
        For each parameter that is gone, by its name, what quantises a span of it into its place.

    Raises:
        ConfigError: "int8-experts" is asked of a model without experts.
    """
    found = dict(_matrices(model, weights))
    if not found:
        raise ConfigError(
            f"weights must be int8 for a model without experts, where {weights} has no effect"
        )
    return {name: _writer(matrix) for name, matrix in found.items()}


def _matrices(model: HybridModel, weights: WeightFormat) -> Iterator[tuple[str, Int8Linear]]:
    for name, module in list(model.layers.named_modules(prefix="layers")):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, Experts):
            experts = Int8Experts(module)
            setattr(model.get_submodule(parent), leaf, experts)
            yield f"{name}.gate_up_proj", experts.gate_up_proj
            yield f"{name}.down_proj", experts.down_proj
        elif isinstance(module, Linear) and weights == "int8":
            above = model.get_submodule(parent)
            if isinstance(above, MixtureOfExperts):
                continue  # the shared expert's coefficient
            matrix = Int8Linear(module.weight.shape, module.weight.device)
            setattr(above, leaf, matrix)
            yield f"{name}.weight", matrix


def _writer(matrix: Int8Linear) -> Callable[[Tensor, int], None]:
    def write(values: Tensor, start: int) -> None:
        K = values.shape[-1]
        at, rows = start // K, values.reshape(-1, K)
        codes, scale = matrix.codes.view(-1, K), matrix.scale.view(-1)
        for part in rows.split(max(1, _ELEMENTS_AT_ONCE // K)):
            held = quantise_rows(part.to(codes.device))
            span = slice(at, at := at + len(part))
            codes[span], scale[span] = held.codes, held.scale

    return write
