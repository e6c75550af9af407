"""Loading: check every header, allocate once, copy tensor by tensor from the mapping."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sevenfold.config import CheckpointError, UnsupportedError
from sevenfold.models.checkpoint.formats import detect_format, read_config
from sevenfold.models.checkpoint.parts import Part, list_parts, stored_dtype
from sevenfold.models.checkpoint.reader import DTYPES, TensorFolder
from sevenfold.models.hybrid import HybridModel

_DTYPE_OF = "embed_tokens.weight"

# Writes a stored tensor into its place, from that element of a parameter on.
WriteSpan = Callable[[Tensor, int], None]
Exchange = Callable[[HybridModel], Mapping[str, WriteSpan]]


def load_model(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    exchange: Exchange | None = None,
) -> HybridModel:
    """Load a checkpoint of any of the three formats.

    Args:
        path: the folder.
        device: where the model shall be; each tensor is copied there straight from the mapped file.
        dtype: of the weights, bf16, fp16, fp32 or fp64; None keeps the file's. Routers (and a
            shared expert's coefficient) are at least fp32 whatever the dtype.
        exchange: called once with the model on the meta device, to put other modules into it; says
            how to write the parameters that are gone. None keeps the model plain.

    Returns:
        The model in evaluation mode. Nothing but the model is allocated.

    Raises:
        CheckpointError: config.json or the weights break a rule; the message names file, key or
            tensor, and remedy. Everything is checked before anything is allocated.
        UnsupportedError: the checkpoint, or dtype, asks for what we do not compute.
    """
    folder = Path(path)
    config, kind = read_config(folder), detect_format(folder)
    parts = list_parts(config, kind)
    files = TensorFolder(folder)
    files.check(parts, kind)
    dtype = _checked_dtype(files, parts) if dtype is None else _supported(dtype)
    with torch.device("meta"):
        model = HybridModel(config)
    writers = {} if exchange is None else exchange(model)
    _fill(_allocate(model, torch.device(device), dtype), files, parts, writers)
    return model.eval()


def _supported(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES.values():
        known = ", ".join(str(d) for d in DTYPES.values())
        raise UnsupportedError(f"dtype must be one of {known}, got {dtype}")
    return dtype


def _checked_dtype(files: TensorFolder, parts: list[Part]) -> torch.dtype:
    """The one dtype of all weights, routers apart."""
    stored = {part: files.stored[part.name] for part in parts}
    dtype = next(tensor.dtype for part, tensor in stored.items() if part.parameter == _DTYPE_OF)
    for part, tensor in stored.items():
        is_lifted = stored_dtype(part.parameter, dtype) != dtype
        if tensor.dtype != dtype and not is_lifted:
            raise CheckpointError(
                f"{tensor.file}: tensor {part.name} must have the embedding's dtype {dtype}, "
                f"got {tensor.dtype}; pass dtype to cast all weights to one"
            )
    return dtype


def _allocate(model: HybridModel, device: torch.device, dtype: torch.dtype) -> HybridModel:
    """Give a model's parameters and buffers new, uninitialised memory on the device."""
    fresh: dict[nn.Parameter, nn.Parameter] = {}
    for name, shape_only in list(model.named_parameters(remove_duplicate=False)):
        if shape_only not in fresh:
            kept = stored_dtype(name, dtype)
            data = torch.empty(shape_only.shape, dtype=kept, device=device)
            fresh[shape_only] = nn.Parameter(data)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, fresh[shape_only])
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    # Moves no parameter; what is no parameter, the decays, follows them to their device.
    return model.to(device)


@torch.no_grad()
def _fill(
    model: HybridModel,
    files: TensorFolder,
    parts: list[Part],
    writers: Mapping[str, WriteSpan],
) -> None:
    parameters = dict(model.named_parameters())
    # File by file, so that each is mapped once.
    for part in sorted(parts, key=lambda part: files.stored[part.name].file):
        if part.parameter in writers:
            writers[part.parameter](files.get(part.name), part.start)
            continue
        flat = parameters[part.parameter].view(-1)
        flat[part.start : part.stop].copy_(files.get(part.name).reshape(-1))
