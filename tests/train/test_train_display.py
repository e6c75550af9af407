import io
from dataclasses import replace

from rich.console import Console
from test_train_metrics import RECORD
from train_helpers import config_of

from sevenfold.train.display import describe, show_run

FAST = replace(RECORD, mfu=0.25, flops_per_s=3.21e12, tokens_per_s=45678.9)


def shown(records: list, run_values: dict, *, terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, _environ={"TERM": "xterm"})
    config = config_of(run_values, run={"log_every_steps": 3})
    with show_run(config, console) as show:
        for record in records:
            show(record)
    return output.getvalue()


def test_one_line_names_every_number() -> None:
    assert describe(FAST, 8) == (
        "step 3/8  loss 2.5000  bits/byte 1.2500  grad 0.500  lr 1.00e-03  tokens/s 45,679  "
        "GFLOP/s 3,210.0  MFU 25.0%"
    )


def test_plain_lines_come_first_last_and_every_few_steps(run_values: dict) -> None:
    records = [replace(RECORD, step=step) for step in range(1, 9)]
    lines = shown(records, run_values, terminal=False).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 1/8",
        "step 3/8",
        "step 6/8",
        "step 8/8",
    ]
    assert "\x1b" not in "".join(lines)


def test_a_skipped_step_and_a_validation_always_get_a_line(run_values: dict) -> None:
    skipped = replace(RECORD, step=4, skipped="loss is nan", loss=None)
    validated = replace(RECORD, step=5, validation_loss=2.0, validation_bits_per_byte=1.125)
    lines = shown([skipped, validated], run_values, terminal=False).splitlines()
    assert lines[0] == "step 4/8  skipped: loss is nan"
    assert "val bits/byte 1.1250" in lines[1]


def test_a_terminal_shows_a_bar_and_a_table(run_values: dict) -> None:
    skipped = replace(RECORD, step=3, skipped="loss is nan")
    text = shown([FAST, skipped, replace(FAST, step=8)], run_values, terminal=True)
    for part in ("8/8", "bits/byte", "1.2500", "MFU", "25.0%", "step 3/8  skipped: loss is nan"):
        assert part in text
