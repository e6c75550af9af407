"""The bundled novels are the ones that their provenance page describes."""

import hashlib
import re

from sevenfold.data.bundled import austen_paths

ROW = re.compile(r"^\| `(?P<file>\S+)` \|.*\| (?P<bytes>[\d,]+) \| `(?P<sha256>[0-9a-f]{64})` \|$")


def test_provenance_lists_every_novel_with_size_and_hash() -> None:
    page = (austen_paths()[0].parent / "PROVENANCE.md").read_text(encoding="utf-8")
    rows = [match for line in page.splitlines() if (match := ROW.match(line))]
    stated = {row["file"]: (int(row["bytes"].replace(",", "")), row["sha256"]) for row in rows}

    found = {}
    for path in austen_paths():
        content = path.read_bytes()
        found[path.name] = (len(content), hashlib.sha256(content).hexdigest())

    assert len(found) == 6
    assert found == stated


def test_novels_are_sorted_by_name() -> None:
    names = [path.name for path in austen_paths()]
    assert names == sorted(names)
    assert names[0] == "emma.txt"
