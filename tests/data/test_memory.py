"""Memory stays the same when the input grows."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")

# Peak memory after each input of a job, whose process is a fork, so that imports are paid once. Not
# by getrusage: its peak includes that of the process which started this one.
SCRIPT = """
import json, os, re, sys
from pathlib import Path
from sevenfold.data import PrepareConfig, prepare
from sevenfold.data.sources import find_sources
from sevenfold.data.survey import survey_documents

def peak_after(action, tokenizer, name):
    config = PrepareConfig(sources=(Path(name),), out=Path(name + ".out"), batch_bytes=1 << 17,
                           split_documents_bytes=4096 if name.endswith(".txt") else None,
                           tokenizer=Path(tokenizer))
    if action == "survey":
        survey_documents(find_sources(config.sources), config, lambda num_bytes: None)
    else:
        prepare(config)
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

for line in sys.stdin:
    if os.fork() == 0:
        action, tokenizer, *inputs = json.loads(line)
        print(json.dumps([peak_after(action, tokenizer, name) for name in inputs]), flush=True)
        os._exit(0)
    if os.wait()[1]:
        print("[]", flush=True)
"""


@pytest.fixture(scope="module")
def jobs() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SCRIPT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        yield process
        process.kill()


def write(path: Path, num_bytes: int) -> Path:
    line = '{"text": "' + "it is a truth universally acknowledged " * 50 + '"}\n'
    count = num_bytes // len(line)
    match path.suffix:
        case ".parquet":
            table = pa.table({"text": [f"{n} {line}" for n in range(count)]})
            pq.write_table(table, path, compression="NONE", use_dictionary=False)
        case ".jsonl":
            path.write_text(line * count, encoding="utf-8")
        case _:
            path.write_text((line[10:-3] + "\n\n") * count, encoding="utf-8")
    return path


def peaks(jobs: subprocess.Popen[str], action: str, tokenizer: Path, *inputs: Path) -> list[int]:
    assert jobs.stdin is not None
    assert jobs.stdout is not None
    jobs.stdin.write(json.dumps([action, str(tokenizer), *map(str, inputs)]) + "\n")
    jobs.stdin.flush()
    return json.loads(jobs.stdout.readline())


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_reading_holds_no_more_of_a_larger_input(
    tmp_path: Path, prepared: Path, jobs: subprocess.Popen[str], suffix: str
) -> None:
    small = write(tmp_path / f"small{suffix}", 8 * MIB)
    large = write(tmp_path / f"large{suffix}", 48 * MIB)
    before, after = peaks(jobs, "survey", prepared, small, large)
    # 40 MiB more input; had it been held once, the peak would show it.
    assert after - before < 20 * MIB, (before, after)


def test_preparing_holds_no_more_of_a_larger_input(
    tmp_path: Path, prepared: Path, jobs: subprocess.Popen[str]
) -> None:
    small = write(tmp_path / "small.jsonl", 2 * MIB)
    large = write(tmp_path / "large.jsonl", 14 * MIB)
    before, after = peaks(jobs, "prepare", prepared, small, large)
    # One encoding of the 12 MiB more would take about 25 times as much.
    assert after - before < 10 * MIB, (before, after)
