"""Every table of the documentation has a head: without one its rows are shown as text."""

import re
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/**/*.md")])


def tables(text: str) -> list[list[str]]:
    """Runs of lines that begin with a bar, outside of code."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    runs = groupby(prose.splitlines(), key=lambda line: line.startswith("|"))
    return [list(lines) for is_table, lines in runs if is_table]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_table_has_a_head(page: Path) -> None:
    for table in tables(page.read_text(encoding="utf-8")):
        assert len(table) > 2, table
        assert re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", table[1]), table[:2]


def test_a_blank_line_inside_a_table_is_seen() -> None:
    head = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert [len(table) for table in tables(f"{head}\n| 3 | 4 |\n```text\n| code |\n```\n")] == [
        3,
        1,
    ]
