"""The run directory: which run it holds, and whether a configuration is that run's."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sevenfold.config import ConfigError
from sevenfold.train.config import RunConfig, load_run_config
from sevenfold.train.toml import to_toml

CONFIG_FILE = "config.toml"
RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
FINAL = "final"

# What may differ when a run goes on: how long, what is written, and what changes speed or memory
# but the results by rounding at most.
_CHANGEABLE = {
    "run.out",
    "run.steps",
    "run.device",
    "run.num_threads",
    "run.checkpoint_every_steps",
    "run.keep_checkpoints",
    "run.async_checkpoints",
    "run.log_every_steps",
    "run.tensorboard",
    "run.trackio",
    "run.peak_flops",
    "batch.micro_batch_rows",
    "parallel",
    "compile",
    "checkpointing",
    "guard",
    "validation",
    "data.path",  # what lies there is compared by its fingerprint
    "data.max_epochs",
}


def open_run_folder(config: RunConfig, data_fingerprint: str) -> None:
    """Create a run's folder, or make sure that an existing one holds the same run.

    Args:
        config: config.run.out is the folder.
        data_fingerprint: of the dataset.

    Raises:
        ConfigError: the folder holds something else, or a run that differs; each field is named.
    """
    folder = config.run.out
    if (folder / CONFIG_FILE).exists():
        _require_same_run(folder, config, data_fingerprint)
    else:
        _require_empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / RUN_FILE, json.dumps(_describe(config, data_fingerprint), indent=2))
    _write(folder / CONFIG_FILE, to_toml(config.model_dump(mode="json")))


def _require_same_run(folder: Path, config: RunConfig, data_fingerprint: str) -> None:
    before = _flat(load_run_config(folder / CONFIG_FILE).model_dump(mode="json"))
    now = _flat(config.model_dump(mode="json"))
    faults = [
        f"{name} must stay {_said(before, name)}, got {_said(now, name)}"
        for name in sorted(before.keys() | now.keys())
        if not _may_change(name) and before.get(name) != now.get(name)
    ]
    known = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["data_fingerprint"]
    if known != data_fingerprint:
        faults.append(f"the data in {_paths(config)} must be the same, got other data")
    if faults:
        raise ConfigError(
            f"{folder} holds another run: {'; '.join(faults)}; give run.out another folder to "
            f"start a new one"
        )


def _paths(config: RunConfig) -> str:
    return ", ".join(str(source.path) for source in config.data.all_sources())


def _said(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "unset"


def _may_change(name: str) -> bool:
    return name in _CHANGEABLE or name.split(".")[0] in _CHANGEABLE


def _require_empty(folder: Path) -> None:
    if folder.is_file():
        raise ConfigError(f"run.out must be a folder, got the file {folder}")
    # A process killed while it made the folder leaves these two.
    begun = {RUN_FILE, f".{RUN_FILE}.tmp", f".{CONFIG_FILE}.tmp"}
    if folder.is_dir() and {path.name for path in folder.iterdir()} - begun:
        raise ConfigError(
            f"run.out must be a new or empty folder or an earlier run, got {folder}, which has "
            f"files but no {CONFIG_FILE}; choose another"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _describe(config: RunConfig, data_fingerprint: str) -> dict[str, Any]:
    device = torch.device(config.run.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": _commit(),
        "versions": {
            "sevenfold": version("sevenfold"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": config.run.device,
        "device_name": name,
        "num_threads": config.run.num_threads or torch.get_num_threads(),
        "seed": config.run.seed,
        "data_fingerprint": data_fingerprint,
    }


def _commit() -> str | None:
    """The commit of the code that runs, None where it is no git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _write(file: Path, text: str) -> None:
    staging = file.with_name(f".{file.name}.tmp")
    with staging.open("w", encoding="utf-8") as stream:
        stream.write(text.rstrip("\n") + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    staging.replace(file)
