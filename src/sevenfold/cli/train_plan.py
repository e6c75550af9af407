"""`sevenfold train --dry-run`: mesh, memory and time of a run, without a GPU and without data."""

from rich.console import Console
from rich.table import Table

from sevenfold.models.training_memory import TrainingMemory
from sevenfold.parallel import ParallelConfig
from sevenfold.parallel.estimate import Rates, Work, rank_memory, step_time
from sevenfold.parallel.rehearsal import heaviest_rank
from sevenfold.train import RunConfig

_GIB = 2**30
_SHARE_OF_PEAK = 0.5


def print_plan(config: RunConfig, console: Console, *, gpu_gib: float | None = None) -> None:
    """Print what a run would be on each rank, and whether it fits a GPU of so many GiB."""
    work = _work(config)
    console.print(_mesh_line(config, work), highlight=False, soft_wrap=True)
    console.print(_mesh_table(config.parallel))
    memory = rank_memory(config.model, config.parallel, work)
    console.print(_memory_table(config, memory))
    if gpu_gib is not None:
        console.print(_fit_line(memory, gpu_gib), highlight=False, soft_wrap=True)
    console.print(_time_table(config, work))


def _work(config: RunConfig) -> Work:
    rows = config.rows_at(0)
    return Work(
        seq_len=config.data.seq_len,
        step_rows=rows,
        micro_batch_rows=min(config.batch.micro_batch_rows or rows, rows),
        element_bytes=4 if config.precision.autocast is None else 2,
        stream_bytes=4 if config.precision.stream is None else 2,
        recompute_every=config.checkpointing.every_layers,
        keeps_attention=config.checkpointing.keep_attention,
    )


def _mesh_line(config: RunConfig, work: Work) -> str:
    ranks, tokens = config.parallel.num_ranks, work.step_rows * work.seq_len
    return (
        f"{ranks:,} ranks; {tokens:,} tokens a step in {work.num_micro_batches} micro-batches of "
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


def _memory_table(config: RunConfig, memory: TrainingMemory) -> Table:
    table = Table(title="Memory of a rank at the highest point of a step", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    held = heaviest_rank(config.model, config.parallel)
    table.caption = (
        f"weights are those of rank {held.rank}, divided on the meta device: {held.total:,} "
        f"parameters"
    )
    parts = {
        "weights, fp32": memory.weights,
        "gradients that exist there, fp32": memory.gradients,
        "moments of AdamW, fp32": memory.moments,
        "copies of weights in bf16": memory.cast_weights,
        "weights gathered, their gradients": memory.gathered,
        "kept by blocks for the backward": memory.kept,
        "of the block that goes backward": memory.working,
        "the batch, products' workspace": memory.batch + memory.workspace,
        "total, without the allocator's overhead": memory.total,
    }
    for name, size in parts.items():
        table.add_row(name, f"{size / _GIB:,.2f}")
    return table


def _fit_line(memory: TrainingMemory, gpu_gib: float) -> str:
    fits = "fits" if memory.total <= gpu_gib * _GIB else "does not fit"
    return f"A rank {fits} a GPU of {gpu_gib:,g} GiB: it takes {memory.total / _GIB:,.2f}"


def _time_table(config: RunConfig, work: Work) -> Table:
    rates = _rates(config)
    time = step_time(config.model, config.parallel, work, rates)
    table = Table(title="Time of a step (estimate)", title_justify="left")
    table.add_column("what")
    table.add_column("s", justify="right")
    table.add_row("products", f"{time.compute_s:,.3f}")
    for name, seconds in time.exchange_s.items():
        table.add_row(f"exchange: {name}", f"{seconds:,.3f}")
    table.add_row("if all overlaps", f"{time.overlapped_s:,.3f}")
    table.add_row("if nothing overlaps", f"{time.serial_s:,.3f}")
    table.caption = (
        f"assumed of a rank: {rates.flops_per_s / 1e12:,.0f} TFLOP/s, "
        f"{rates.near_bytes_per_s / 1e9:,.0f} GB/s within a node of {rates.node_ranks}, "
        f"{rates.far_bytes_per_s / 1e9:,.0f} GB/s beyond"
    )
    return table


def _rates(config: RunConfig) -> Rates:
    peak = config.run.peak_flops
    return Rates() if peak is None else Rates(flops_per_s=_SHARE_OF_PEAK * peak)
