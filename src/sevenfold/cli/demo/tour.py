"""The tour: real novels in, three small models trained on them, and what the linear layers buy."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sevenfold.cli.demo.context import CONTEXTS, ContextCost, measure_contexts
from sevenfold.cli.demo.model import PROMPT, TrainedModel
from sevenfold.cli.demo.served import Chat, ask_served
from sevenfold.config import parse_config
from sevenfold.data import PrepareConfig, austen_paths, prepare, progress_bar
from sevenfold.engine import LLM, SamplingParams
from sevenfold.models import preset
from sevenfold.models.checkpoint import load_model
from sevenfold.train import RunConfig, read_metrics, train
from sevenfold.train.display import show_run

FORMS = ("hybrid", "softmax", "lightning")
VOCAB_SIZE = 4096
SEQ_LEN = 512
TOKENS_PER_STEP = 2048
SAMPLE_TOKENS = 120


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for data, models and report.")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="Training steps of 2,048 tokens a model.")] = 150,
) -> None:
    """Train three small models on six novels, report what the linear layers buy, serve one."""
    # Here, and not above: no other command should wait for matplotlib.
    from sevenfold.cli.demo.report import write_report

    console, began = Console(), time.perf_counter()
    _say(console, "1. Six novels by Jane Austen -> a tokenizer and token shards")
    _prepare(out / "data", console)
    _say(console, "2. Train nano as hybrid (7 linear : 1 softmax), all-softmax and all-linear")
    models = [_train(form, out, steps, console) for form in FORMS]
    _say(console, f"3. Time and memory of one token after {CONTEXTS[0]} to {CONTEXTS[-1]:,} tokens")
    costs = _measure(models, console)
    report = out / "report.html"
    write_report(report, models, costs, time.perf_counter() - began)
    _say(console, "4. Serve the hybrid on this machine, and ask it through the openai client")
    _show_chat(ask_served(models[0].checkpoint), console)
    _say(console, f"The report: {report}")
    command = f'sevenfold generate {models[0].checkpoint} "{PROMPT}"'
    console.print(f"Try next:   .venv/bin/{command}", highlight=False, soft_wrap=True)
    command = f"sevenfold serve {models[0].checkpoint}"
    console.print(f"            .venv/bin/{command}", highlight=False, soft_wrap=True)


def run_table(form: str, out: Path, steps: int) -> dict[str, Any]:
    """Return the demo's run as a run file would say it; the three differ in their layers only."""
    return {
        "run": {"out": str(out / "runs" / form), "steps": steps, "log_every_steps": 25},
        "data": {"path": str(out / "data"), "seq_len": SEQ_LEN},
        "model": preset(f"nano-{form}").model_dump(mode="json"),
        "optimizer": {"lr": 2e-3},
        "schedule": {"kind": "cosine", "warmup_steps": max(1, steps // 10), "min_ratio": 0.1},
        "batch": {"tokens_per_step": TOKENS_PER_STEP},
        "validation": {"every_steps": max(1, steps // 5), "num_samples": 16},
    }


def _prepare(folder: Path, console: Console) -> None:
    values = {
        "sources": [str(path) for path in austen_paths()],
        "out": str(folder),
        "vocab_size": VOCAB_SIZE,
        "split_documents_bytes": 32_768,
        "validation_fraction": 0.1,
    }
    with progress_bar(console) as progress:
        prepare(parse_config(PrepareConfig, values, "demo"), progress)


def _train(form: str, out: Path, steps: int, console: Console) -> TrainedModel:
    console.print(f"nano-{form}", style="bold")
    config = parse_config(RunConfig, run_table(form, out, steps), "demo")
    with show_run(config, console) as show:
        result = train(config, on_step=show)
    if result.final is None:
        raise typer.Exit(1)
    params = SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.95, seed=1)
    [completion] = LLM(result.final).generate([PROMPT], params)
    metrics = read_metrics(result.folder / "metrics.jsonl")
    return TrainedModel(form, result.final, metrics, completion.text)


def _measure(models: list[TrainedModel], console: Console) -> dict[str, list[ContextCost]]:
    measured = {model.form: load_model(model.checkpoint) for model in models[:2]}
    with console.status("measuring"):
        return measure_contexts(measured)


def _show_chat(chat: Chat, console: Console) -> None:
    for answer in chat.answers:
        console.print(
            f"> {' '.join(answer.split())}", highlight=False, soft_wrap=True, markup=False
        )
    console.print(
        f"Of the second turn's {chat.prompt_tokens} tokens, {chat.cached_tokens} were cached.",
        highlight=False,
        soft_wrap=True,
    )


def _say(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", highlight=False, soft_wrap=True)
