"""`sevenfold inspect`: what a configuration costs and how far it sees, before any training."""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sevenfold.config import ConfigError, unknown_name
from sevenfold.models import LayerType, ModelConfig, preset, preset_names
from sevenfold.models.accounting import (
    WeightFormat,
    count_parameters,
    decode_bytes,
    decode_flops,
    kv_bytes,
    prefill_flops,
    state_bytes,
    state_crossover_tokens,
    training_flops,
)
from sevenfold.models.checkpoint import read_config
from sevenfold.models.deployment import plan_deployment
from sevenfold.ops import layer_log_decay

CONTEXTS = (1024, 8192, 65_536, 1_048_576)


def inspect_command(
    target: Annotated[str, typer.Argument(metavar="PRESET|CKPT|RUN.toml", help="What to inspect.")],
    on: Annotated[
        str | None,
        typer.Option(metavar="NxGB", help="Also plan to serve it: 8x80 is 8 devices of 80 GB."),
    ] = None,
) -> None:
    """Print parameters, cost against context, and how far each layer sees."""
    config, devices = find_config(target), None if on is None else _devices(on)
    console = Console()
    console.print(_layers_line(target, config), highlight=False, soft_wrap=True)
    console.print(parameter_table(config))
    console.print(context_table(config))
    console.print(reach_table(config))
    if devices is not None:
        console.print(deployment_table(config, *devices))


def find_config(target: str) -> ModelConfig:
    """Return the model of a preset's name, a checkpoint folder or a run file.

    Raises:
        ConfigError: the target is none of them.
    """
    path = Path(target)
    if target in preset_names():
        return preset(target)
    if path.suffix == ".toml":
        # Here, and not above: a preset should not wait for what training needs.
        from sevenfold.train import load_run_config

        return load_run_config(path).model
    if path.exists():
        return read_config(path)
    rule = unknown_name("target", target, preset_names())
    raise ConfigError(f"{rule}; a target is a preset, a checkpoint folder or a run file")


def parameter_table(config: ModelConfig) -> Table:
    """Return the parameters by part."""
    counts = count_parameters(config)
    table = _table("Parameters", "part", "number")
    parts = {
        "embedding": counts.embedding,
        "head": counts.lm_head,
        "linear attention": counts.linear_attention,
        "softmax attention": counts.softmax_attention,
        "router": counts.router,
        "experts": counts.experts,
        "dense feed-forward, shared experts": counts.dense_feed_forward,
        "norms": counts.norms,
        "total": counts.total,
        "active (without embedding, head, norms)": counts.active,
    }
    for name, number in parts.items():
        if number:
            table.add_row(name, f"{number:,}")
    return table


def context_table(config: ModelConfig) -> Table:
    """Return cost and memory of one sequence against its length, keys and values in bf16."""
    columns = ("context", "prefill", "next token", "training", "KV", "state", "moved")
    table = _table(
        "One sequence; bf16 weights and KV, fp32 state; moved: bytes for the next token at batch 1",
        *columns,
    )
    for context in CONTEXTS:
        table.add_row(
            f"{context:,}",
            _unit(prefill_flops(config, context), "FLOP"),
            _unit(decode_flops(config, context), "FLOP"),
            _unit(training_flops(config, [context]), "FLOP"),
            _unit(kv_bytes(config, context), "B"),
            _unit(state_bytes(config), "B"),
            _unit(decode_bytes(config, context), "B"),
        )
    crossover = state_crossover_tokens(config)
    if crossover is not None:
        table.caption = f"smaller than the KV of an all-softmax twin from {crossover:,} tokens up"
    return table


def reach_table(config: ModelConfig) -> Table:
    """Return how many tokens back each kind of layer sees, fastest to slowest head."""
    table = _table(
        "Reach in tokens (a linear head: 1 / slope)", "layers", "fastest", "slowest head"
    )
    linear = _layers_of(config, "linear_attention")
    for layer in dict.fromkeys((linear[0], linear[len(linear) // 2], linear[-1])) if linear else ():
        horizons = -1 / layer_log_decay(config.num_attention_heads, layer, config.num_hidden_layers)
        table.add_row(f"linear, layer {layer}", f"{horizons.min():,.1f}", f"{horizons.max():,.0f}")
    if sliding := _layers_of(config, "sliding_attention"):
        table.add_row(f"{len(sliding)} sliding", *[f"{config.sliding_window:,}"] * 2)
    if full := _layers_of(config, "full_attention"):
        table.add_row(f"{len(full)} full", "all", "all")
    return table


def deployment_table(config: ModelConfig, num_devices: int, device_bytes: int) -> Table:
    """Return what serving by tensor parallelism takes of each device, in each weight format."""
    table = _table(
        f"Served on {num_devices} x {device_bytes / 1e9:g} GB, a tenth reserved; per device",
        *("weights", "bytes", "state", "KV of 1M", "free", "longest context"),
    )
    formats: dict[str, WeightFormat | None] = {"bf16": None, "int8": "int8"}
    if config.moe is not None:
        formats["int8-experts"] = "int8-experts"
    for name, weights in formats.items():
        plan = plan_deployment(
            config, num_devices=num_devices, device_bytes=device_bytes, weights=weights
        )
        table.add_row(
            name,
            _unit(plan.weight_bytes, "B"),
            _unit(plan.state_bytes, "B"),
            _unit(plan.kv_bytes_per_token * CONTEXTS[-1], "B"),
            _unit(plan.free_bytes, "B") if plan.fits else "does not fit",
            _tokens(plan.context_tokens) if plan.fits else "",
        )
    return table


def _devices(on: str) -> tuple[int, int]:
    """Number and bytes of the devices that --on names."""
    found = re.fullmatch(r"([1-9]\d*)x(\d+(?:\.\d+)?)", on)
    if found is None:
        raise ConfigError(f"on must be a number of devices, x and the GB of each, got {on!r}")
    return int(found[1]), int(float(found[2]) * 1e9)


def _tokens(number: int | None) -> str:
    return "any" if number is None else f"{number:,} tokens"


def _layers_of(config: ModelConfig, layer_type: LayerType) -> list[int]:
    return [layer for layer, kind in enumerate(config.layer_types) if kind == layer_type]


def _layers_line(target: str, config: ModelConfig) -> str:
    kinds = {kind: config.count(kind) for kind in dict.fromkeys(config.layer_types)}
    parts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    heads = f"{config.num_attention_heads} heads of {config.head_dim}"
    return (
        f"{target}: {config.num_hidden_layers} layers ({parts}), {config.hidden_size} wide, {heads}"
    )


def _table(title: str, *columns: str) -> Table:
    # Without its frame the widest table fits into 80 columns.
    table = Table(title=title, title_justify="left", caption_justify="left", show_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
    return table


def _unit(number: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5 or prefix == "E":  # which three digits round to 1e+03
            return f"{number:,.3g} {prefix}{unit}"
        number /= 1000
    raise AssertionError("the last prefix always returns")
