"""Reports of a preparation, and the bar that shows them."""

import io
from collections.abc import Callable

from rich.console import Console

from sevenfold.data import PrepareConfig, PrepareProgress, prepare, progress_bar


def test_each_stage_is_reported_to_its_end(configure: Callable[..., PrepareConfig]) -> None:
    reports: list[PrepareProgress] = []
    manifest = prepare(configure(), reports.append)
    last = {report.stage: report for report in reports}
    text = sum(record.num_bytes for record in manifest.splits.values())
    assert last == {
        "hash sources": PrepareProgress("hash sources", text, text),
        "survey": PrepareProgress("survey", text, None),
        "train tokenizer": PrepareProgress("train tokenizer", text, text),
        "encode": PrepareProgress("encode", text, text),
    }


def test_the_bar_names_every_stage() -> None:
    page = io.StringIO()
    with progress_bar(Console(file=page, force_terminal=True, width=100)) as show:
        show(PrepareProgress("survey", 500, None))
        show(PrepareProgress("encode", 500, 1000))
        show(PrepareProgress("encode", 1000, 1000))
    assert "survey" in page.getvalue()
    assert "1.0/1.0 kB" in page.getvalue()
