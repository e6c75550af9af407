"""The rules of the house that no linter knows: who imports what, sizes, tolerances, the README."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "sevenfold"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))

# Library -> where in the package it may be imported, at module level or inside a function.
IMPORTERS = {
    "triton": ("ops/",),
    "torch.distributed": ("parallel/", "train/", "engine/"),
    "transformers": ("bench/peer.py",),
}

# `import sevenfold` does without each of these.
NOT_AT_IMPORT = ("triton", "transformers", "datasketch", "tensorboard", "matplotlib")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # the docstring does not count
MAX_README_LINES = 150

# "ops/lightning/triton_forward.py" or "ops/lightning/triton_forward.py:kernel" -> its own limit.
LARGER: dict[str, int] = {
    # One parameter for each option that the command offers.
    "cli/serve.py:serve_command": 75,
}

# "tests/...py:line" of a literal tolerance that no error budget can give, with its reason.
LITERAL_TOLERANCES: dict[str, str] = {}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def names_of(path: Path) -> tuple[str, ...]:
    return tuple(names_reached(parsed(path)))


def names_reached(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a module imports or takes from an imported module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def is_within(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


@pytest.mark.parametrize("library", IMPORTERS)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    offenders = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if not path.relative_to(PACKAGE).as_posix().startswith(IMPORTERS[library])
        and any(is_within(name, library) for name in names_of(path))
    ]
    assert offenders == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.tensor import DTensor",
        "def f():\n    import torch\n    torch.distributed.barrier()",
        "importlib.import_module('torch.distributed')",
    ],
)
def test_every_spelling_of_an_import_is_seen(source: str) -> None:
    assert any(is_within(name, "torch.distributed") for name in names_reached(ast.parse(source)))


WITHOUT_OPTIONAL = """
import importlib, importlib.util, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
import sevenfold
print(*sorted(name for name in BLOCKED if name in sys.modules))
"""


def test_sevenfold_imports_without_triton_and_without_any_extra() -> None:
    script = f"BLOCKED = {NOT_AT_IMPORT!r}\n{WITHOUT_OPTIONAL}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def literal_tolerances(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that name a tolerance by a number; zero, which asks for equality, is none."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        approx = ast.unparse(node.func).endswith("approx")
        names = {"atol", "rtol", "rel", "abs"} if approx else {"atol", "rtol"}
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg in names and isinstance(value, ast.Constant) and value.value:
                yield node.lineno


def test_tolerances_come_from_the_error_rule() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in TEST_FILES
        for line in literal_tolerances(parsed(path))
    }
    assert found == set(LITERAL_TOLERANCES)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("assert_close(a, b, atol=1e-5, rtol=0)", [1]),
        ("assert a == pytest.approx(b, rel=0.01)", [1]),
        ("assert_close(a, b, atol=0, rtol=0)", []),
        ("assert_close(a, b, atol=bound, rtol=0)", []),
    ],
)
def test_literal_tolerances_are_seen(source: str, found: list[int]) -> None:
    assert list(literal_tolerances(ast.parse(source))) == found


def test_readme_fits_its_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def sizes() -> Iterator[tuple[str, int, int]]:
    """Name, lines and limit of every file and function of the package."""
    for path in SOURCES:
        name = path.relative_to(PACKAGE).as_posix()
        yield name, len(path.read_text().splitlines()), MAX_FILE_LINES
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}:{node.name}", function_lines(node), MAX_FUNCTION_LINES


def test_files_and_functions_stay_short() -> None:
    too_long = {name: lines for name, lines, limit in sizes() if lines > LARGER.get(name, limit)}
    assert too_long == {}


def test_every_exception_is_still_needed() -> None:
    limits = {name: (lines, limit) for name, lines, limit in sizes()}
    idle = [n for n in LARGER if n not in limits or limits[n][0] <= limits[n][1]]
    assert idle == []


def pins() -> dict[str, str]:
    """Name and version of every line of the pinned environment, all of the form name==version."""
    lines = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in split}


def test_torch_is_left_to_its_own_step() -> None:
    """Triton is pinned for its interpreter: torch's build for CPUs, which is tested, has none."""
    assert [name for name in pins() if re.match(r"(torch|nvidia)\b", name)] == []


# It brings a web framework of its own; its tests put a stand-in in its place.
NOT_PINNED = ("trackio",)


def test_pinned_versions_are_those_that_pyproject_asks_for() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = table["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    groups += table["dependency-groups"].values()
    wanted = [Requirement(line) for group in groups for line in group]
    pinned = pins() | {"torch": "2.13.0"}
    unmet = [
        str(need)
        for need in wanted
        if need.name not in NOT_PINNED
        and not need.specifier.contains(pinned.get(canonicalize_name(need.name), "0"))
    ]
    assert unmet == [], "run `make lock`"


def test_readme_maps_every_package_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("src/sevenfold/\n", 1)[1].split("```", 1)[0]
    mapped = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    assert sorted(mapped) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
