"""`sevenfold serve`: a checkpoint behind OpenAI's interface."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from sevenfold.cli.guessing import (
    DraftBranches,
    DraftCheckpoint,
    DraftMemory,
    DraftTokens,
    Guessing,
)
from sevenfold.config import ConfigError, parse_config
from sevenfold.engine.building import EngineOptions
from sevenfold.engine.cache import SessionLimits
from sevenfold.engine.heap import freeze_heap
from sevenfold.engine.memory_report import plan_report
from sevenfold.engine.precision import Precision

if TYPE_CHECKING:
    from sevenfold.server import BatchingEngine, ServerSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


ApiKeys = Annotated[Path | None, typer.Option(help="Keys that may ask, one a line.")]
AdminKeys = Annotated[
    Path | None, typer.Option(help="Keys that alone may read /metrics, one a line.")
]
Memory = Annotated[
    float | None,
    typer.Option(help="For states, keys and cached prefixes; a share of what is free if left."),
]


def serve_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder.")],
    host: Annotated[str, typer.Option(help="Beyond loopback it needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_keys_file: ApiKeys = None,
    admin_keys_file: AdminKeys = None,
    model_name: Annotated[
        str | None,
        typer.Option(help="What clients call the model; the folder's name if not given."),
    ] = None,
    max_requests: Annotated[
        int, typer.Option(help="Outputs under way or waiting; more get 429.")
    ] = 256,
    max_deadline: Annotated[float, typer.Option(help="Seconds for a request at most.")] = 3600.0,
    drain: Annotated[float, typer.Option(help="Seconds to end requests after SIGTERM.")] = 30.0,
    memory_gib: Memory = None,
    host_memory_gib: Annotated[
        float, typer.Option(help="Of the host's memory, for cached prefixes that must make room.")
    ] = 0.0,
    max_context: Annotated[
        int | None, typer.Option(help="Tokens that a request must be able to reach.")
    ] = None,
    max_sessions: Annotated[
        int, typer.Option(help="Conversations that may keep their prefix; 0 for none.")
    ] = 64,
    session_idle: Annotated[float, typer.Option(help="Seconds until one loses it.")] = 600.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="int8 or fp8; with -experts only those: quantised on load.")
    ] = None,
    states: Annotated[str, typer.Option(help="Running: fp32, fp16, int8 or bf16.")] = "fp32",
    snapshots: Annotated[str, typer.Option(help="Cached: fp32, fp16, int8 or auto.")] = "fp32",
    tensor_parallel: Annotated[
        int, typer.Option(help="Ranks that divide the model; on cuda a GPU each.")
    ] = 1,
    batch_invariant: Annotated[
        bool, typer.Option(help="Outputs do not depend on others, to the bit; slower.")
    ] = False,
    draft_tokens: DraftTokens = None,
    draft_model: DraftCheckpoint = None,
    draft_memory_gib: DraftMemory = None,
    draft_branches: DraftBranches = None,
    warm_up: Annotated[
        bool, typer.Option(help="Whether to be ready only when nothing happens for the first time.")
    ] = True,
) -> None:
    """Serve a checkpoint to OpenAI's clients and, at /, to people."""
    values = {
        "host": host,
        "port": port,
        "max_requests": max_requests,
        "max_choices": min(max_requests, 128),
        "max_deadline_s": max_deadline,
        "drain_s": drain,
    }
    kept = {"max_sessions": max_sessions, "idle_s": session_idle}
    bits = {"weights": weights, "states": states, "snapshots": snapshots}
    draft_bytes = None if draft_memory_gib is None else _bytes("draft_memory_gib", draft_memory_gib)
    guessing = Guessing(draft_tokens, draft_branches, draft_model, draft_bytes)
    options = EngineOptions(
        device=_device(device),
        dtype=_dtype(dtype),
        memory_bytes=None if memory_gib is None else _bytes("memory_gib", memory_gib),
        host_bytes=_bytes("host_memory_gib", host_memory_gib),
        context_tokens=max_context,
        precision=parse_config(Precision, bits, "serve"),
        speculation=guessing.config(),
        tensor_parallel=tensor_parallel,
        batch_invariant=batch_invariant,
    )
    settings = _settings({"api_keys": api_keys_file, "admin_keys": admin_keys_file}, values)
    name = checkpoint.resolve().name if model_name is None else _name(model_name)
    sessions = parse_config(SessionLimits, kept, "serve")
    start = partial(_engine, checkpoint, name, options, guessing, sessions)
    _serve(checkpoint, settings, start, warm_up=warm_up)


def _name(name: str) -> str:
    if not name.strip():
        raise ConfigError(f"model_name must not be empty, got {name!r}")
    return name


def _bytes(option: str, gib: float) -> int:
    if not 0 <= gib < math.inf:
        raise ConfigError(f"{option} must be 0 or more and finite, got {gib:g}")
    return int(gib * 2**30)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return None if name is None else DTYPES[name]


def _device(name: str) -> str:
    if name != "cpu" and not (name.partition(":")[0] == "cuda" and torch.cuda.is_available()):
        raise typer.BadParameter(f"device must be cpu, or cuda where there is a GPU, got {name!r}")
    return name


def _settings(key_files: Mapping[str, Path | None], values: dict[str, object]) -> "ServerSettings":
    try:
        from sevenfold.server.settings import MIN_KEY_CHARS, ServerSettings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serve: {error.name} must be installed; pip install 'sevenfold[serve]' brings it"
        ) from error
    keys = {name: _read_keys(file, MIN_KEY_CHARS) for name, file in key_files.items()}
    return parse_config(ServerSettings, values | keys, "serve")


def _engine(
    checkpoint: Path,
    name: str,
    options: EngineOptions,
    guessing: Guessing,
    sessions: SessionLimits,
) -> "BatchingEngine":
    """Load the checkpoint, say what the memory gives, and start."""
    from sevenfold.server import BatchingEngine

    source = options.load(checkpoint)
    draft = guessing.load(str(source.model.device), options.dtype)
    if draft is not None:
        draft.check_serves(source.model, source.tokenizer)
    plan, limits = options.size(source)
    typer.echo(plan_report(plan, limits))
    kept = {"sessions": sessions, "speculation": options.speculation, "draft": draft}
    try:
        return BatchingEngine(source, name, plan, limits, **kept)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            "memory_gib and host_memory_gib must fit into free memory, got "
            f"{plan.layout.num_slabs * plan.layout.slab_bytes:,} and {plan.host_bytes:,} bytes"
        ) from error


def _serve(
    checkpoint: Path,
    settings: "ServerSettings",
    start: Callable[[], "BatchingEngine"],
    *,
    warm_up: bool,
) -> None:
    from sevenfold.server import ServerApp, bind, listen, read_template

    with bind(settings) as taken:
        template = read_template(checkpoint)  # before what takes long
        engine = start()
        app = ServerApp(engine, settings, template)
        shown, port = taken.getsockname()[:2]
        shown = f"[{shown}]" if ":" in shown else shown

        async def prepare() -> None:
            if warm_up:
                await engine.warm_up(lambda line: typer.echo(f"warming up: {line}"))
            freeze_heap()
            typer.echo(f"{engine.model_name} at http://{shown}:{port} (chat at /, routes at /docs)")

        listen(app, settings, taken, prepare)


def _read_keys(file: Path | None, least_chars: int) -> list[str]:
    if file is None:
        return []
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise OSError(f"{file} must be a readable file, got: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} must be a text file in UTF-8, got other bytes") from error
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key]
    # Checked here too, so that no message shows a key.
    short = [key for key in keys if len(key) < least_chars]
    if short or not keys:
        raise ConfigError(
            f"{file} must hold an API key of {least_chars} characters or more on each line, got "
            f"{len(short)} shorter ones of {len(keys)}"
        )
    return keys
