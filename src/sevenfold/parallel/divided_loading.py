"""Loading a checkpoint's part of one tensor rank: the rest is never allocated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sevenfold.models import HybridModel
from sevenfold.models.checkpoint.load import WriteSpan, load_model
from sevenfold.parallel.apply import divide_model
from sevenfold.parallel.config import ParallelConfig
from sevenfold.parallel.layout import Layout
from sevenfold.parallel.parts import ParameterParts, parts_of, tensor_slice

# Writes columns of whole rows, [n, width of the whole], into a rank's part, whose rows begin at an
# element of whole rows.
WriteColumns = Callable[[Tensor, int, slice], None]
ExchangePart = Callable[[HybridModel], Mapping[str, WriteColumns]]


@dataclass(frozen=True)
class DividedModel:
    """A model whose parameters are one rank's parts, before the ranks can speak to each other."""

    _model: HybridModel

    def connect(self, layout: Layout) -> HybridModel:
        """Return the model, which from now on computes with all ranks.

        Args:
            layout: of the degrees that it was loaded for.
        """
        divide_model(self._model, layout, weights_are_divided=True)
        return self._model


def load_divided_model(
    path: Path,
    parallel: ParallelConfig,
    rank: int,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    exchange: ExchangePart | None = None,
) -> DividedModel:
    """Load a tensor rank's part of a checkpoint, as load_model loads the whole.

    Args:
        path: the folder.
        parallel: with tensor alone above 1.
        rank: whose part.
        device: where it shall be.
        dtype: of the weights; None keeps the file's.
        exchange: as load_model's, of a model that is divided; it is given whole rows.

    Raises:
        CheckpointError, UnsupportedError: as load_model.
        ConfigError: the degree does not divide the model's sizes.
    """

    def narrow(model: HybridModel) -> Mapping[str, WriteSpan]:
        return narrow_model(model, parallel, rank, exchange)

    return DividedModel(load_model(path, device=device, dtype=dtype, exchange=narrow))


def narrow_model(
    model: HybridModel, parallel: ParallelConfig, rank: int, exchange: ExchangePart | None = None
) -> dict[str, WriteSpan]:
    """Exchange a model's divided parameters for one rank's parts.

    Args:
        model: whole, on the meta device; changed in place.
        parallel, rank, exchange: as load_divided_model's.

    Returns:
        For each parameter that is gone, by its name, what writes a span of the whole into its part.

    Raises:
        ConfigError: the degree does not divide the model's sizes.
    """
    parallel.check_model(model.config)
    size = parallel.tensor
    shapes = {name: whole.shape for name, whole in model.named_parameters(remove_duplicate=False)}
    # The embedding's weight may be the head's too: one part under both names.
    narrowed: dict[nn.Parameter, nn.Parameter] = {}
    for name, whole in list(model.named_parameters(remove_duplicate=False)):
        parts = parts_of(name)
        if parts.tensor is None:
            continue
        if whole not in narrowed:
            own = tensor_slice(whole.data, parts, rank, size)
            narrowed[whole] = nn.Parameter(torch.empty_like(own), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, narrowed[whole])
    own = {} if exchange is None else dict(exchange(model))
    return {
        name: _Writer(own.get(name) or _copy_into(model, name), parts_of(name), (shape, rank, size))
        for name, shape in shapes.items()
        if name in own or parts_of(name).tensor is not None
    }


def _copy_into(model: HybridModel, name: str) -> WriteColumns:
    def write(rows: Tensor, start: int, columns: slice) -> None:
        # Asked for now: the parameter was given memory since.
        part, at = model.get_parameter(name).data, start // rows.shape[-1]
        part.view(-1, part.shape[-1])[at : at + len(rows)].copy_(rows[:, columns])

    return write


@dataclass(frozen=True)
class _Writer:
    """Writes spans of a whole parameter into this rank's part of it.

    where: shape of the whole, rank and number of ranks.
    """

    write: WriteColumns
    parts: ParameterParts
    where: tuple[torch.Size, int, int]

    def __call__(self, stored: Tensor, start: int) -> None:
        """Take what is this rank's of stored, whose first element is the whole's element start."""
        shape, rank, size = self.where
        width, dim = shape[-1], self.parts.tensor
        rows, first = stored.reshape(-1, width), start // width
        if dim is None or dim == len(shape) - 1:
            part = width if dim is None else width // size
            begin = 0 if dim is None else rank * part
            self.write(rows, start, slice(begin, begin + part))
            return
        number = torch.arange(shape[:-1].numel()).view(*shape[:-1], 1)
        kept = tensor_slice(number, self.parts, rank, size).flatten()  # rising
        begin, end = torch.searchsorted(kept, torch.tensor([first, first + len(rows)])).tolist()
        if begin < end:
            self.write(rows[kept[begin:end] - first], begin * width, slice(width))
