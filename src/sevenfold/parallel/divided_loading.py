"""Loading a checkpoint's part of one tensor rank: the rest is never allocated."""

from collections.abc import Mapping
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
) -> DividedModel:
    """Load a tensor rank's part of a checkpoint, as load_model loads the whole.

    Args:
        path: the folder.
        parallel: with tensor alone above 1.
        rank: whose part.
        device: where it shall be.
        dtype: of the weights; None keeps the file's.

    Raises:
        CheckpointError, UnsupportedError: as load_model.
        ConfigError: the degree does not divide the model's sizes.
    """

    def exchange(model: HybridModel) -> Mapping[str, WriteSpan]:
        parallel.check_model(model.config)
        return _narrow(model, rank, parallel.tensor)

    return DividedModel(load_model(path, device=device, dtype=dtype, exchange=exchange))


def _narrow(model: HybridModel, rank: int, size: int) -> dict[str, WriteSpan]:
    """Exchange the divided parameters for their parts; says how to write these."""
    writers: dict[str, WriteSpan] = {}
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
        writers[name] = _Writer(model, name, parts, (whole.shape, rank, size)).write
    return writers


@dataclass(frozen=True)
class _Writer:
    """Writes spans of a whole parameter into this rank's part of it.

    where: shape of the whole, rank and number of ranks.
    """

    model: HybridModel
    name: str
    parts: ParameterParts
    where: tuple[torch.Size, int, int]

    def write(self, stored: Tensor, start: int) -> None:
        """Take what is this rank's of stored, whose first element is the whole's element start."""
        shape, rank, size = self.where
        width, dim = shape[-1], self.parts.tensor
        part = self.model.get_parameter(self.name).data
        rows, first = stored.reshape(-1, width), start // width
        if dim == len(shape) - 1:
            own = rows.chunk(size, 1)[rank]
            part.view(-1, part.shape[-1])[first : first + len(rows)].copy_(own)
            return
        number = torch.arange(shape[:-1].numel()).view(*shape[:-1], 1)
        kept = tensor_slice(number, self.parts, rank, size).flatten()  # rising
        begin, end = torch.searchsorted(kept, torch.tensor([first, first + len(rows)])).tolist()
        part.view(-1, width)[begin:end].copy_(rows[kept[begin:end] - first])
