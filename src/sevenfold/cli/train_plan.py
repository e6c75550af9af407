"""`sevenfold train --dry-run`: mesh, memory and time of a run, without a GPU and without data."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from sevenfold.models.training_memory import TrainingMemory
from sevenfold.parallel import ParallelConfig
from sevenfold.parallel.estimate import Rates, Work, rank_memory, step_time, update_memory
from sevenfold.parallel.rehearsal import heaviest_rank
from sevenfold.train import RunConfig

_GIB = 2**30
_SHARE_OF_PEAK = 0.5


def print_plan(config: RunConfig, console: Console, *, gpu_gib: float | None = None) -> None:
    """Print what a run would be on each rank, and whether it fits a GPU of so many GiB."""
    works = _works(config)
    for which, work in works.items():
        console.print(_step_line(config, work, which), highlight=False, soft_wrap=True)
    console.print(_mesh_table(config.parallel))
    how, largest = (config.model, config.parallel), list(works.values())[-1]
    points = {
        f"{which}\nbackward".strip(): rank_memory(*how, work, config.optimizer)
        for which, work in works.items()
    }
    points["update"] = update_memory(*how, largest, config.optimizer)
    console.print(_memory_table(config, points))
    if gpu_gib is not None:
        most = max(memory.total for memory in points.values())
        console.print(_fit_line(most, gpu_gib), highlight=False, soft_wrap=True)
    console.print(_time_table(config, works))


def _works(config: RunConfig) -> dict[str, Work]:
    """The first step, and the largest where a ramp or the loss makes more of it."""
    sizes = config.batch.sizes()
    first, largest = (size // config.data.seq_len for size in (sizes[0], max(sizes)))
    if first == largest:
        return {"": _work(config, first)}
    return {"first": _work(config, first), "largest": _work(config, largest)}


def _work(config: RunConfig, rows: int) -> Work:
    return Work(
        seq_len=config.data.seq_len,
        step_rows=rows,
        micro_batch_rows=min(config.batch.micro_batch_rows or rows, rows),
        element_bytes=4 if config.precision.autocast is None else 2,
        stream_bytes=4 if config.precision.stream is None else 2,
        recompute_every=config.checkpointing.every_layers,
        keeps_attention=config.checkpointing.keep_attention,
    )


def _step_line(config: RunConfig, work: Work, which: str) -> str:
    ranks, tokens = config.parallel.num_ranks, work.step_rows * work.seq_len
    step = f"{tokens:,} tokens a step in"
    if which:
        step = f"{which} step: {tokens:,} tokens in"
    return (
        f"{ranks:,} ranks; {step} {work.num_micro_batches:,} micro-batches of "
        f"{work.micro_batch_rows:,} rows of {work.seq_len:,}"
    )


def _mesh_table(parallel: ParallelConfig) -> Table:
    table = Table(title="Mesh, outermost first", title_justify="left")
    for column in ("dimension", "degree", "divides", "ranks of the first group"):
        table.add_column(column)
    t, c = parallel.tensor, parallel.context
    shards, width = parallel.weight_shards, parallel.expert_width
    rows = (
        ("pipeline", parallel.pipeline, _stages(parallel), parallel.stage_ranks),
        ("replicate", parallel.replicate, "rows", shards * t),
        ("shard", parallel.shard, "rows, weights", c * t),
        ("context", c, "tokens of a row, weights", t),
        ("tensor", t, "heads, widths, vocabulary", 1),
        ("expert", parallel.expert, "experts", width),
        ("expert_tensor", width, "an expert's width", 1),
    )
    for name, degree, divides, stride in rows:
        members = [i * stride for i in range(degree)]
        shown = ", ".join(map(str, members if degree <= 4 else [*members[:2], "...", members[-1]]))
        table.add_row(name, f"{degree:,}", divides, shown)
    return table


def _stages(parallel: ParallelConfig) -> str:
    each = parallel.pipeline_stages
    return "layers" if each == 1 else f"layers, in {each} stages each"


def _memory_table(config: RunConfig, points: dict[str, TrainingMemory]) -> Table:
    table = Table(title="Memory of a rank at the highest points of a step", title_justify="left")
    table.add_column("GiB")
    for name in points:
        table.add_column(name, justify="right")
    held = heaviest_rank(config.model, config.parallel)
    table.caption = (
        f"weights are those of rank {held.rank}, divided on the meta device: {held.total:,} "
        f"parameters"
    )
    has_muon = config.optimizer.kind == "muon"
    parts: dict[str, Callable[[TrainingMemory], int]] = {
        "weights, fp32": lambda m: m.weights,
        "gradients that exist there, fp32": lambda m: m.gradients,
        f"moments of {'Muon and AdamW' if has_muon else 'AdamW'}, fp32": lambda m: m.moments,
        "copies of weights in bf16": lambda m: m.cast_weights,
        "weights gathered, their gradients": lambda m: m.gathered,
        "kept by blocks for the backward": lambda m: m.kept,
        "of the block that goes backward": lambda m: m.working,
        "matrices that Muon has whole": lambda m: m.update,
        "the batch, products' workspace": lambda m: m.batch + m.workspace,
        "total, without the allocator's overhead": lambda m: m.total,
    }
    if not has_muon:
        parts.pop("matrices that Muon has whole")
    for name, size in parts.items():
        table.add_row(name, *(f"{size(memory) / _GIB:,.2f}" for memory in points.values()))
    return table


def _fit_line(most: int, gpu_gib: float) -> str:
    fits = "fits" if most <= gpu_gib * _GIB else "does not fit"
    return f"A rank {fits} a GPU of {gpu_gib:,g} GiB: it takes {most / _GIB:,.2f}"


def _time_table(config: RunConfig, works: dict[str, Work]) -> Table:
    rates = _rates(config)
    table = Table(title="Time of a step (estimate)", title_justify="left")
    table.add_column("s")
    for which in works:
        table.add_column(f"{which} step".strip(), justify="right")
    times = [step_time(config.model, config.parallel, work, rates) for work in works.values()]
    rows = {"products": [time.compute_s for time in times]}
    for name in times[0].exchange_s:
        rows[f"exchange: {name}"] = [time.exchange_s[name] for time in times]
    rows["if all overlaps"] = [time.overlapped_s for time in times]
    rows["if nothing overlaps"] = [time.serial_s for time in times]
    for name, seconds in rows.items():
        table.add_row(name, *(f"{value:,.3f}" for value in seconds))
    table.caption = (
        f"assumed of a rank: {rates.flops_per_s / 1e12:,.0f} TFLOP/s, "
        f"{rates.near_bytes_per_s / 1e9:,.0f} GB/s within a node of {rates.node_ranks}, "
        f"{rates.far_bytes_per_s / 1e9:,.0f} GB/s beyond"
    )
    if config.optimizer.kind == "muon":
        table.caption += "; what Muon gathers and computes in an update comes on top"
    return table


def _rates(config: RunConfig) -> Rates:
    peak = config.run.peak_flops
    return Rates() if peak is None else Rates(flops_per_s=_SHARE_OF_PEAK * peak)
