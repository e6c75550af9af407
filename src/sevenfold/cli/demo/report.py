"""The demo's report: one HTML file that needs nothing else."""

import base64
import html
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from sevenfold.cli.demo.context import ContextCost
from sevenfold.cli.demo.model import PROMPT, TrainedModel
from sevenfold.models import preset
from sevenfold.models.accounting import count_parameters, state_bytes

COLOURS = {"hybrid": "#0b6e4f", "softmax": "#c1440e", "lightning": "#2b59c3"}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sevenfold demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
blockquote {{ border-left: 4px solid #ddd; margin: 0 0 1rem; padding: .2rem 1rem;
  white-space: pre-wrap; font-family: Georgia, serif; }}
footer {{ color: #666; font-size: .85rem; margin-top: 2rem; }}
</style></head><body>
<h1>Three small models, six novels</h1>
<p>The same model three times, trained from the same seed on the same tokens in the same order:
<b>hybrid</b> has seven lightning-attention layers and one softmax layer, <b>softmax</b> has eight
softmax layers, <b>lightning</b> has eight lightning-attention layers. One learning rate serves all
three and is tuned for none: this shows how they begin to learn, not which is best in the end.</p>
<h2>How they learn</h2>
{losses}
{results}
<h2>What a token costs after a long text</h2>
<p>Measured on this machine at batch 1. A softmax layer reads the keys and values of all tokens
before; a lightning-attention layer reads a state whose size never changes.</p>
{contexts}
{context_table}
<h2>What they write</h2>
<p>A model of four million parameters after a few minutes knows the manner, not the sense.
All three went on from <i>{prompt}</i></p>
{samples}
<h2>What they are made of</h2>
{parameters}
<footer>{footer}</footer>
</body></html>
"""


def write_report(
    path: Path,
    models: Sequence[TrainedModel],
    costs: Mapping[str, Sequence[ContextCost]],
    took_s: float,
) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        models: trained, the hybrid first.
        costs: of the models measured against context.
        took_s: seconds that the demo took.
    """
    page = PAGE.format(
        losses=_image(_loss_figure(models), "loss against tokens"),
        results=_results(models),
        contexts=_image(_context_figure(costs), "time and memory against context"),
        context_table=_context_rows(costs),
        prompt=html.escape(PROMPT),
        samples="".join(_sample(model, PROMPT) for model in models),
        parameters=_parameters([model.form for model in models]),
        footer=html.escape(
            f"{took_s:.0f} s on {platform.machine()}, {torch.get_num_threads()} threads, "
            f"Python {platform.python_version()}, torch {torch.__version__}"
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _loss_figure(models: Sequence[TrainedModel]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for model in models:
        steps = [line for line in model.metrics if line["loss"] is not None]
        tokens = [line["tokens"] for line in steps]
        axes.plot(tokens, [line["loss"] for line in steps], color=COLOURS[model.form], alpha=0.3)
        checked = [line for line in steps if line["validation_loss"] is not None]
        axes.plot(
            [line["tokens"] for line in checked],
            [line["validation_loss"] for line in checked],
            color=COLOURS[model.form],
            marker="o",
            label=f"{model.form}, validation",
        )
    axes.set(xlabel="tokens", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _context_figure(costs: Mapping[str, Sequence[ContextCost]]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for form, points in costs.items():
        contexts = [point.context_tokens for point in points]
        style: dict[str, Any] = {"color": COLOURS[form], "marker": "o", "label": form}
        time_axes.plot(contexts, [1e3 * point.step_s for point in points], **style)
        memory_axes.plot(contexts, [point.cache_bytes / 1e6 for point in points], **style)
    time_axes.set(xlabel="context (tokens)", ylabel="ms a token", ylim=0)
    memory_axes.set(xlabel="context (tokens)", ylabel="cache (MB)", yscale="log")
    for axes in (time_axes, memory_axes):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _image(figure: Figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _results(models: Sequence[TrainedModel]) -> str:
    rows = []
    for model in models:
        checked = [line for line in model.metrics if line["validation_loss"] is not None][-1]
        seconds = sum(line["step_time_s"] for line in model.metrics)
        rows.append(
            (
                model.form,
                f"{checked['validation_loss']:.3f}",
                f"{checked['validation_bits_per_byte']:.3f}",
                f"{checked['tokens']:,}",
                f"{checked['tokens'] / seconds:,.0f}",
            )
        )
    head = ("model", "validation loss", "bits per byte", "tokens trained", "tokens a second")
    return _table(head, rows)


def _context_rows(costs: Mapping[str, Sequence[ContextCost]]) -> str:
    forms = list(costs)
    head = ["context", *(f"{form}, ms a token" for form in forms), *(f"{f}, MB" for f in forms)]
    rows = []
    for at in zip(*costs.values(), strict=True):
        times = [f"{1e3 * point.step_s:.2f}" for point in at]
        sizes = [f"{point.cache_bytes / 1e6:.2f}" for point in at]
        rows.append([f"{at[0].context_tokens:,}", *times, *sizes])
    return _table(head, rows)


def _parameters(forms: Sequence[str]) -> str:
    rows = []
    for form in forms:
        config = preset(f"nano-{form}")
        counts = count_parameters(config)
        numbers = (counts.total, counts.active, counts.linear_attention, counts.softmax_attention)
        state = f"{state_bytes(config):,}"
        rows.append([form, *(f"{number:,}" for number in numbers), f"{counts.experts:,}", state])
    head = ("model", "parameters", "active", "linear attention", "softmax attention", "experts")
    return _table((*head, "state bytes"), rows)


def _sample(model: "TrainedModel", prompt: str) -> str:
    text = html.escape(prompt) + "<b>" + html.escape(model.sample) + "</b>"
    return f"<h3>{model.form}</h3><blockquote>{text}</blockquote>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
