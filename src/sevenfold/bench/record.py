"""A benchmark's record: figures with the device, versions and commit that they belong to."""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def write_record(
    path: Path,
    command: str,
    cases: Sequence[Mapping[str, Any]],
    *,
    device: torch.device | None = None,
) -> None:
    """Write a benchmark's cases as JSON.

    Args:
        path: the file.
        command: what a reader runs to repeat it.
        cases: one flat table row each.
        device: where they ran; None is the CPU.
    """
    record = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("sevenfold", "torch", "transformers")},
        "commit": commit_of(),
        "cases": list(cases),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def device_name(device: torch.device | str | None) -> str:
    """Return the name of a GPU, or of this machine's processor."""
    if device is not None and torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name(Path("/proc/cpuinfo").read_text())


def cpu_name(cpuinfo: str) -> str:
    """Name the first processor of /proc/cpuinfo; family and model tell generations apart."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    fields: dict[str, str] = {}
    for name, _, value in lines:
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    parts = [fields["model name"]]
    if {"cpu family", "model"} <= fields.keys():
        parts.append(f"family {fields['cpu family']} model {fields['model']}")
    return ", ".join(parts)


def commit_of() -> str | None:
    """Return the working tree's commit, with + if it has changes; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
