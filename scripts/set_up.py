"""Make `.venv` hold exactly what this checkout pins; do nothing when it already does.

`.venv/.ready` names everything the environment depends on. It is removed before the first
change and written by one rename after the last, so that an interrupted set-up is never taken for a
finished one: the next call starts that environment afresh.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036, the message of an older Python
    sys.exit(
        f"Sevenfold must have Python 3.11 or newer, got {sys.version.split()[0]} "
        f"({sys.executable}); name another, for example `make test PYTHON=python3.12`"
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


def interpreter():
    """The Python, and the place, that an environment is built for; it serves no other."""
    return f"{sys.version} {sys.base_prefix} {ROOT}".replace("\n", " ")


def wanted_stamp():
    """What a finished set-up leaves: its interpreter, and a hash of the files that decide."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return f"{interpreter()}\n{digest.hexdigest()}\n"


def stamp():
    """The stamp of the last finished set-up, empty when there is none."""
    return READY.read_text() if READY.is_file() and PYTHON.exists() else ""


def run(label, *command):
    """Run one step; a failure ends the set-up and leaves it unfinished."""
    print(f"set-up: {label}", flush=True)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nset-up failed at: {label}; the next call starts afresh")


def set_up():
    """Build or update `.venv`, then mark it ready."""
    pip = (PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-compile")
    if stamp().startswith(interpreter() + "\n"):
        READY.unlink()
    else:
        run("virtual environment", sys.executable, "-m", "venv", "--clear", VENV)
    run(TORCH, *pip, TORCH)
    # The file lists the full closure, so --no-deps is complete and pip cannot choose another torch.
    run("requirements/dev.txt", *pip, "--no-deps", "-r", "requirements/dev.txt")
    run("sevenfold itself", *pip, "--no-deps", "--no-build-isolation", "--editable", ".")
    run("check that all requirements agree", PYTHON, "-m", "pip", "--quiet", "check")
    unfinished = READY.with_suffix(".tmp")
    unfinished.write_text(wanted_stamp())
    unfinished.replace(READY)


def main():
    """Set up once, whoever else tries at the same time."""
    if stamp() == wanted_stamp():
        return
    with (ROOT / "scripts" / "set_up.py").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp() != wanted_stamp():
            set_up()


if __name__ == "__main__":
    main()
