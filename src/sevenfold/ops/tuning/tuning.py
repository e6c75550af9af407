"""Tuning tables: which launch configuration a kernel takes on a device.

Every JSON file beside this one has the form {kernel: {device name: {key: configuration}}}. A device
without a row of its own takes that of its sibling, else that of "default", with a warning.
"""

import json
import warnings
from functools import cache
from importlib import resources

from sevenfold.config import UnsupportedError

_DEFAULT = "default"
# Of as many multiprocessors of the same kind; only their memory's rates differ.
_SIBLINGS = {"NVIDIA H100 80GB HBM3": "NVIDIA H200"}


@cache
def best_config(kernel: str, key: str, device_name: str) -> dict[str, int]:
    """Return the committed launch configuration of a kernel.

    Args:
        kernel: the kernel's name.
        key: what its choice depends on, such as the widths.
        device_name: as torch.cuda.get_device_name gives it.

    Returns:
        Names and values of the configuration. Where the device has no row for the key it is its
        sibling's, and a warning says so once for each kernel; or the default's, and a warning says
        so once for each kernel, key and device.

    Raises:
        UnsupportedError: not even the default has a row.
    """
    rows = _tables().get(kernel, {})
    for device in (device_name, _SIBLINGS.get(device_name), _DEFAULT):
        config = rows.get(device, {}).get(key) if device else None
        if config is None:
            continue
        if device == _DEFAULT != device_name:
            _say(f"{kernel} has no tuning for {key} on {device_name}, and takes the default")
        elif device != device_name:
            _say(f"{kernel} has no tuning of its own on {device_name}, and takes that of {device}")
        return dict(config)
    raise UnsupportedError(f"{kernel} must have a tuning table for its key, got {key!r}")


@cache
def _say(message: str) -> None:
    warnings.warn(message, stacklevel=3)


@cache
def _tables() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    folder = resources.files("sevenfold.ops.tuning")
    tables: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for entry in sorted(folder.iterdir(), key=lambda file: file.name):
        if entry.name.endswith(".json"):
            tables |= json.loads(entry.read_text())
    return tables
