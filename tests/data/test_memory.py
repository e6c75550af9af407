"""Memory stays the same when the input grows."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MIB = 1 << 20

# Peak memory after a small and after a large input, in one process: the difference is the growth.
SCRIPT = """
import re, sys
from pathlib import Path
from sevenfold.data import PrepareConfig, prepare
root, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
for name in sys.argv[3:]:
    split = 4096 if name.endswith(".txt") else None
    prepare(PrepareConfig(sources=(root / name,), out=root / (name + ".out"), tokenizer=tokenizer,
                          split_documents_bytes=split, batch_bytes=1 << 17))
    # Not getrusage: its peak includes that of the process which started this one.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
"""


def write(path: Path, num_bytes: int) -> None:
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_peak_memory_does_not_grow_with_the_input(
    tmp_path: Path, prepared: Path, suffix: str
) -> None:
    sizes = {f"small{suffix}": 2 * MIB, f"large{suffix}": 18 * MIB}
    for name, size in sizes.items():
        write(tmp_path / name, size)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(prepared), *sizes]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    small, large = (int(line) for line in result.stdout.split())
    # 16 MiB more input; had it been held once, the peak would show it.
    assert large - small < 6 * MIB
