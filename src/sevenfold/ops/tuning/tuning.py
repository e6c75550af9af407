"""Tuning tables: which launch configuration a kernel takes on a device.

Every JSON file beside this one has the form {kernel: {device name: {key: configuration}}}, where
the device "default" serves every device without a row of its own, with a warning.
"""

import json
import warnings
from functools import cache
from importlib import resources

from sevenfold.config import UnsupportedError

_DEFAULT = "default"


@cache
def best_config(kernel: str, key: str, device_name: str) -> dict[str, int]:
    """Return the committed launch configuration of a kernel.

    Args:
        kernel: the kernel's name.
        key: what its choice depends on, such as the widths.
        device_name: as torch.cuda.get_device_name gives it.

    Returns:
        Names and values of the configuration. Where the device has no row for the key it is the
        default's, and a warning says so once for each kernel, key and device.

    Raises:
        UnsupportedError: not even the default has a row.
    """
    rows = _tables().get(kernel, {})
    for device in (device_name, _DEFAULT):
        config = rows.get(device, {}).get(key)
        if config is None:
            continue
        if device != device_name:
            warnings.warn(
                f"{kernel} has no tuning for {key} on {device_name}, and takes the default",
                stacklevel=2,
            )
        return dict(config)
    raise UnsupportedError(f"{kernel} must have a tuning table for its key, got {key!r}")


@cache
def _tables() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    folder = resources.files("sevenfold.ops.tuning")
    tables: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for entry in sorted(folder.iterdir(), key=lambda file: file.name):
        if entry.name.endswith(".json"):
            tables |= json.loads(entry.read_text())
    return tables
