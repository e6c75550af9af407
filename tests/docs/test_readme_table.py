"""scripts/readme_table: the README's results come from benchmarks/results and nowhere else."""

import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "readme_table"

CASE = {
    "case": "forward 1 x 2,048",
    "ours_s": 0.1234,
    "transformers_s": 1.5,
    "ratio": 1.5 / 0.1234,
    "target_ratio": 1.5,
    "floor_s": 0.05,
    "ours_peak_bytes": 98_765_432,
    "transformers_peak_bytes": 1_234_567_890,
    "matmul_flops_per_s": 3.254e11,
    "read_bytes_per_s": 2.34e10,
    "ours_error": 1e-6,
    "transformers_error": 1e-4,
}
RECORD = {
    "command": "sevenfold bench cpu",
    "date": "2026-01-31",
    "device": "Some CPU",
    "threads": 2,
    "python": "3.12.1",
    "versions": {"sevenfold": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0"},
    "commit": "abc1234",
    "cases": [CASE],
}
README = "# Title\n\n<!-- results:begin -->\nold\n<!-- results:end -->\n\n## Rest\n"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("readme_table", str(SCRIPT))
    spec = spec_from_loader("readme_table", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def project(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "README.md").write_text(README)
    (folder / "benchmarks" / "results").mkdir(parents=True)
    for number, record in enumerate(records):
        path = folder / "benchmarks" / "results" / f"{number}.json"
        path.write_text(json.dumps(record))
    return folder


def test_the_readme_shows_the_recorded_results() -> None:
    command = [sys.executable, str(SCRIPT), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_record_becomes_a_table(script: ModuleType, tmp_path: Path) -> None:
    root = project(tmp_path, RECORD)
    assert script.main([], root) == 0
    text = (root / "README.md").read_text()
    row = "| forward 1 x 2,048 | 123 ms | 1.50 s | 12.16 | 1.50 | 50.0 ms | 98.8 MB | 1.23 GB |"
    assert row in text.splitlines()
    assert (
        "`sevenfold bench cpu` on Some CPU, 2 threads: matmul 325 GFLOP/s, read 23.4 GB/s.\n"
        "Python 3.12.1, sevenfold 0.1.0, torch 2.13.0, transformers 5.17.0; "
        "commit abc1234, 2026-01-31.\n"
    ) in text
    assert text.startswith("# Title\n\n<!-- results:begin -->\n| case |")
    assert text.endswith("\n<!-- results:end -->\n\n## Rest\n")


def test_without_a_record_the_readme_says_so(script: ModuleType, tmp_path: Path) -> None:
    root = project(tmp_path)
    assert script.main([], root) == 0
    assert README.replace("old", script.NONE) == (root / "README.md").read_text()


def test_check_sees_a_stale_readme_and_writes_nothing(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = project(tmp_path, RECORD, RECORD | {"device": "Another CPU"})
    assert script.main(["--check"], root) == 1
    assert "run scripts/readme_table" in capsys.readouterr().err
    assert (root / "README.md").read_text() == README
    assert script.main([], root) == 0
    assert script.main(["--check"], root) == 0
    assert (root / "README.md").read_text().count("| forward 1 x 2,048 |") == 2


def test_a_file_of_another_kind_is_named(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = project(tmp_path, {"cases": []})
    assert script.main([], root) == 1
    assert "must hold benchmark records" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12.34, "12.3 s"), (0.9999, "1,000 ms"), (0.00234, "2.34 ms"), (5e-7, "0.50 µs")],
)
def test_times_have_three_digits(script: ModuleType, value: float, shown: str) -> None:
    assert script.seconds(value) == shown
