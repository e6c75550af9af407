"""scripts/kernels_page: the page's results come from the records and nowhere else."""

import json
import shutil
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
from test_kernels_table import RECORD

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("kernels_page", str(ROOT / "scripts" / "kernels_page"))
    spec = spec_from_loader("kernels_page", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path, script: ModuleType) -> Path:
    """A project with one record and the page of this one."""
    page = tmp_path / script.PAGE
    page.parent.mkdir()
    shutil.copy(ROOT / script.PAGE, page)
    record = tmp_path / script.RECORDS / "nvidia-h200.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps(RECORD))
    return tmp_path


def test_the_page_shows_the_records(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0
    for path in (ROOT / script.RECORDS).glob("*.json"):
        assert (ROOT / script.figure(path)).exists()


def test_a_record_becomes_a_section_with_a_figure(script: ModuleType, project: Path) -> None:
    page = project / script.PAGE
    before = page.read_text()
    assert script.main(["--check"], project) == 1
    assert page.read_text() == before
    assert script.main([], project) == 0
    assert script.main(["--check"], project) == 0
    lines = page.read_text().splitlines()
    start = lines.index(script.BEGIN)
    assert lines[start + 1] == "## NVIDIA H200"
    assert lines[start + 3].endswith("(assets/kernels-nvidia-h200.svg)")
    assert (
        "| forward B2 | 0.500 ms | – | **0.700 ms** (1.40 x floor) | 0.500 ms (0.71x) |  |  |"
        in lines
    )
    assert lines[-1] == script.END
    assert "<svg" in (project / "docs/assets/kernels-nvidia-h200.svg").read_text()
    assert page.read_text().split(script.BEGIN)[0] == before.split(script.BEGIN)[0]


def test_without_records_the_page_says_so(script: ModuleType, project: Path) -> None:
    shutil.rmtree(project / script.RECORDS)
    assert script.main([], project) == 0
    assert f"{script.BEGIN}\n{script.NONE}\n{script.END}" in (project / script.PAGE).read_text()


def test_bad_usage(script: ModuleType) -> None:
    assert script.main(["--nope"]) == 2
