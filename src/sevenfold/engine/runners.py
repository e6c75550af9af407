"""Which runner serves a model: by the device that it lies on."""

from collections.abc import Sequence

from sevenfold.config import ConfigError
from sevenfold.engine.device import CudaCapture, DeviceRunner, decode_batch_sizes
from sevenfold.engine.runner import Runner
from sevenfold.engine.storage import Storage
from sevenfold.models import HybridModel


def make_runner(
    model: HybridModel,
    storage: Storage,
    limits: tuple[int, int],
    batch_sizes: Sequence[int] | None,
) -> Runner | DeviceRunner:
    """Return the runner of a model over its storage.

    Args:
        model: on its device.
        storage: beside it.
        limits: tokens of a page, and rows of a decoding step at most.
        batch_sizes: of decoding steps that are recorded on a GPU; None takes decode_batch_sizes of
            the most rows.

    Raises:
        ConfigError: batch_sizes are given for a CPU, or do not rise from 1.
    """
    page_tokens, most_rows = limits
    if model.device.type != "cuda":
        if batch_sizes is not None:
            raise ConfigError(
                f"decode_batch_sizes must be None on {model.device}, which records no graphs, got "
                f"{list(batch_sizes)}"
            )
        return Runner(model, storage, page_tokens=page_tokens)
    sizes = decode_batch_sizes(most_rows) if batch_sizes is None else batch_sizes
    capture = CudaCapture(model.device) if sizes else None
    return DeviceRunner(model, storage, page_tokens=page_tokens, batch_sizes=sizes, capture=capture)
