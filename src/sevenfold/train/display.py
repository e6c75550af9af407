"""Showing a run: live on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sevenfold.train.config import RunConfig
from sevenfold.train.metrics import StepRecord

_REFRESH_PER_S = 4


@contextmanager
def show_run(config: RunConfig, console: Console) -> Iterator[Callable[[StepRecord], None]]:
    """Give a listener for train(on_step=...) that shows the run on a console.

    Args:
        config: of the run; run.log_every_steps sets how often a plain line comes.
        console: a terminal gets a live table, anything else plain lines.

    Yields:
        The listener.
    """
    if not console.is_terminal:
        yield _plain_lines(config, console)
        return
    bar = Progress(
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    task = bar.add_task("train", total=config.run.steps)
    with Live(bar, console=console, refresh_per_second=_REFRESH_PER_S) as live:

        def show(record: StepRecord) -> None:
            if record.skipped is not None:
                live.console.print(describe(record, config.run.steps), highlight=False)
            bar.update(task, completed=record.step)
            live.update(Group(bar, _table(record)))

        yield show


def describe(record: StepRecord, num_steps: int) -> str:
    """Return one line of text about a step."""
    if record.skipped is not None:
        back = ", back to the newest checkpoint" if record.goes_back else ""
        return f"step {record.step}/{num_steps}  skipped: {record.skipped}{back}"
    parts = [f"step {record.step}/{num_steps}"]
    parts += [f"{name} {value}" for name, value in _shown(record).items()]
    return "  ".join(parts)


def _plain_lines(config: RunConfig, console: Console) -> Callable[[StepRecord], None]:
    def show(record: StepRecord) -> None:
        due = record.step % config.run.log_every_steps == 0 or record.step == config.run.steps
        if due or record.step == 1 or record.skipped or record.validation_loss is not None:
            line = describe(record, config.run.steps)
            console.print(line, highlight=False, soft_wrap=True)

    return show


def _table(record: StepRecord) -> Table:
    table = Table.grid(padding=(0, 3))
    shown = _shown(record)
    table.add_row(*shown, style="dim")
    table.add_row(*shown.values())
    return table


def _shown(record: StepRecord) -> dict[str, str]:
    """Name and text of each number that is worth a column."""
    texts = {
        "loss": _text(record.loss, ".4f"),
        "bits/byte": _text(record.bits_per_byte, ".4f"),
        "val bits/byte": _text(record.validation_bits_per_byte, ".4f"),
        "grad": _text(record.grad_norm, ".3f"),
        "lr": _text(record.lr, ".2e"),
        "tokens/s": _text(record.tokens_per_s, ",.0f"),
        "GFLOP/s": _text(record.flops_per_s / 1e9, ",.1f"),
        "MFU": _text(record.mfu, ".1%"),
    }
    return {name: text for name, text in texts.items() if text is not None}


def _text(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)
