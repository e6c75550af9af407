"""The benchmark's record: rows with the device, versions, commit and slopes they belong to."""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sevenfold.bench.kernels.cases import NUM_LAYERS, Case
from sevenfold.bench.kernels.exact import MAX_RELATIVE_ERROR
from sevenfold.bench.kernels.sides import Side
from sevenfold.ops import layer_log_decay


def build_record(
    rows: Sequence[Mapping[str, Any]],
    ceilings: Mapping[str, float],
    cases: Sequence[Case],
    sides: Sequence[Side],
    commit: str | None,
) -> dict[str, Any]:
    """Return everything about a run, ready for JSON."""
    return {
        "command": "sevenfold bench kernels",
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": commit,
        "sides": {
            side.name: {
                "package": side.package,
                "version": side.version(),
                "installed": side.is_installed(),
            }
            for side in sides
        },
        "ceilings": dict(ceilings),
        "max_relative_error": MAX_RELATIVE_ERROR,
        "slopes": slopes_of(cases),
        "rows": [dict(row) for row in rows],
    }


def slopes_of(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return the slopes of every number of heads and layer that the cases run with."""
    used = sorted({(case.H, case.layer) for case in cases})
    return [
        {
            "H": H,
            "layer": layer,
            "num_layers": NUM_LAYERS,
            "slopes": [-x for x in layer_log_decay(H, layer, NUM_LAYERS).tolist()],
        }
        for H, layer in used
    ]


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record; what is not a number is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def default_path(device: str) -> Path:
    """Return where a device's record lies: a folder of its own, named after the device."""
    name = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path("benchmarks/results/kernels") / f"{name}.json"
