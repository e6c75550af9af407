"""Make `.venv` hold exactly what this checkout pins; do nothing when it already does.

`.venv/.ready` holds a hash of everything the environment depends on. It is removed before the first
change and written by one rename after the last, so that an interrupted set-up is never taken for a
finished one: the next call starts that environment afresh.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "Sevenfold must have Python 3.11 or newer, got %d.%d (%s); name another, for example "
        "`make test PYTHON=python3.12`" % (*sys.version_info[:2], sys.executable)
    )

import fcntl
import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
READY = VENV / ".ready"
PYTHON = VENV / "bin" / "python"
TORCH = "torch==2.13.0"
INPUTS = ("requirements/dev.txt", "pyproject.toml", "scripts/set_up.py")


def wanted_key():
    """Hash of the interpreter, the place and the files that decide what `.venv` holds."""
    digest = hashlib.sha256(f"{sys.version}\n{sys.base_prefix}\n{ROOT}\n".encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def is_ready():
    """Whether a finished set-up of exactly these inputs is in place."""
    return READY.is_file() and READY.read_text() == wanted_key() and PYTHON.exists()


def run(label, *command):
    """Run one step; a failure ends the set-up and leaves it unfinished."""
    print(f"set-up: {label}", flush=True)
    done = subprocess.run([str(part) for part in command], cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit(f"set-up failed at: {label}; the next call starts afresh")


def set_up():
    """Build or update `.venv`, then mark it ready."""
    pip = (PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-compile")
    if READY.is_file() and PYTHON.exists():
        READY.unlink()
    else:
        run("virtual environment", sys.executable, "-m", "venv", "--clear", VENV)
    run(TORCH, *pip, TORCH)
    # The file lists the full closure, so --no-deps is complete and pip cannot choose another torch.
    run("requirements/dev.txt", *pip, "--no-deps", "-r", "requirements/dev.txt")
    run("sevenfold itself", *pip, "--no-deps", "--no-build-isolation", "--editable", ".")
    run("check that all requirements agree", PYTHON, "-m", "pip", "--quiet", "check")
    unfinished = READY.with_suffix(".tmp")
    unfinished.write_text(wanted_key())
    unfinished.replace(READY)


def main():
    """Set up once, whoever else tries at the same time."""
    if is_ready():
        return
    with (ROOT / "scripts" / "set_up.py").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_ready():
            set_up()


if __name__ == "__main__":
    main()
