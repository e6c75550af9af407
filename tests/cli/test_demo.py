"""The tour with everything made tiny: its report, and that it trains nothing twice."""

import html
import re
import struct
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from cli_helpers import run_cli

from sevenfold.cli.demo import context, tour
from sevenfold.cli.demo.model import PROMPT
from sevenfold.data import austen_paths
from sevenfold.engine import LLM
from sevenfold.models import HybridModel, empty_state, init_weights, preset
from sevenfold.models.accounting import count_parameters, kv_bytes, state_bytes
from sevenfold.train import read_metrics

STEPS = 3
CONTEXTS = (8, 16)
SAMPLE_TOKENS = 40
FORMS = ("hybrid", "softmax", "lightning")


@pytest.fixture(scope="module")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forty pages of one novel as documents, rows of 64 tokens, two short contexts."""
    novel, pages = tmp_path_factory.mktemp("novel"), []
    text = austen_paths()[0].read_text(encoding="utf-8")
    for page in range(40):
        pages.append(novel / f"{page:02}.txt")
        pages[-1].write_text(text[3000 * page : 3000 * (page + 1)], encoding="utf-8")
    sizes = {"VOCAB_SIZE": 400, "SEQ_LEN": 64, "TOKENS_PER_STEP": 128, "CONTEXTS": CONTEXTS}
    sizes["SAMPLE_TOKENS"] = SAMPLE_TOKENS
    with (
        mock.patch.multiple(tour, austen_paths=lambda: tuple(pages), **sizes),
        mock.patch.multiple(context, CONTEXTS=CONTEXTS, REPEATS=3),
    ):
        yield


@pytest.fixture(scope="module")
def folder(_tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tour") / "demo"
    result = run_cli("demo", "--out", out, "--steps", STEPS)
    assert result.exit_code == 0, (result.output, result.exception)
    assert f"The report: {out / 'report.html'}" in result.output
    said = re.search(r"Of the second turn's (\d+) tokens, (\d+) were cached.", result.output)
    assert said is not None
    assert int(said[1]) > int(said[2]) >= 64
    command = f'.venv/bin/sevenfold generate {out / "runs" / "hybrid" / "final"} "{PROMPT}"'
    assert f"Try next:   {command}" in result.output
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def tables(page: str) -> list[list[list[str]]]:
    """Each table's rows, the head first."""
    return [
        [
            [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", table)
        ]
        for table in re.findall(r"<table>(.*?)</table>", page)
    ]


def test_the_report_needs_nothing_else(report: str) -> None:
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", report)
    assert [source[:22] for source in sources] == ["data:image/png;base64,"] * 2
    assert not re.search(r"<(script|link|iframe|object)|@import|url\(|https?://", report)
    alts = re.findall(r'<img alt="([^"]*)"', report)
    assert alts == ["loss against tokens", "time and memory against context"]
    for source in sources:
        image = b64decode(source.partition(",")[2], validate=True)
        assert image.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", image[16:24])
        assert (width, height) == (1080, 480)  # 9 x 4 inches at 120 dots


def test_the_samples_are_what_the_models_write(report: str, folder: Path) -> None:
    samples = re.findall(r"<h3>(\w+)</h3><blockquote>(.*?)<b>(.*?)</b></blockquote>", report, re.S)
    assert [form for form, _, _ in samples] == list(FORMS)
    params = tour.SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.95, seed=1)
    for form, prompt, text in samples:
        assert html.unescape(prompt) == PROMPT
        [done] = LLM(folder / "runs" / form / "final").generate([PROMPT], params)
        # HTML has one kind of line end.
        assert html.unescape(text) == done.text.replace("\r\n", "\n").replace("\r", "\n")


def test_the_results_are_those_of_the_runs(report: str, folder: Path) -> None:
    head, *rows = tables(report)[0]
    assert head[:4] == ["model", "validation loss", "bits per byte", "tokens trained"]
    assert [row[0] for row in rows] == list(FORMS)
    for form, loss, bits, tokens, speed in rows:
        lines = read_metrics(folder / "runs" / form / "metrics.jsonl")
        assert len(lines) == STEPS
        assert loss == f"{lines[-1]['validation_loss']:.3f}"
        assert bits == f"{lines[-1]['validation_bits_per_byte']:.3f}"
        assert tokens == "384"  # 3 x 128
        took = sum(line["step_time_s"] for line in lines)
        assert speed == f"{384 / took:,.0f}"


def test_the_context_table_has_the_bytes_of_accounting(report: str) -> None:
    head, *rows = tables(report)[1]
    assert head == [
        "context",
        *("hybrid, ms a token", "softmax, ms a token"),
        *("hybrid, MB", "softmax, MB"),
    ]
    assert [row[0] for row in rows] == ["8", "16"]
    for cells, tokens in zip(rows, CONTEXTS, strict=True):
        assert all(float(cell) > 0 for cell in cells[1:3])
        # The cache has room for the next token too; nano is in fp32.
        sizes = [
            kv_bytes(preset(f"nano-{form}"), tokens + 1, 4) + state_bytes(preset(f"nano-{form}"))
            for form in ("hybrid", "softmax")
        ]
        assert cells[3:] == [f"{size / 1e6:.2f}" for size in sizes]


def test_the_parameter_table_has_the_numbers_of_accounting(report: str) -> None:
    _, *rows = tables(report)[2]
    for row, form in zip(rows, FORMS, strict=True):
        counts = count_parameters(preset(f"nano-{form}"))
        parts = (
            *(counts.total, counts.active, counts.linear_attention),
            *(counts.softmax_attention, counts.experts, state_bytes(preset(f"nano-{form}"))),
        )
        assert row == [form, *(f"{number:,}" for number in parts)]


def test_the_three_runs_differ_in_their_layers_alone() -> None:
    hybrid, *others = (tour.run_table(form, Path("demo"), STEPS) for form in FORMS)
    for other in others:
        assert other["model"].pop("layer_types") != hybrid["model"]["layer_types"]
        assert other["run"].pop("out") != hybrid["run"]["out"]
    del hybrid["model"]["layer_types"], hybrid["run"]["out"]
    assert hybrid == others[0] == others[1]


def test_again_reuses_the_trained_models(folder: Path) -> None:
    kept = [*folder.glob("runs/*/final/*"), *folder.glob("runs/*/metrics.jsonl")]
    kept += folder.glob("data/*")
    before = {path: path.read_bytes() for path in kept}
    assert len(before) > 12
    page = (folder / "report.html").read_text()
    samples = re.findall("<blockquote>.*?</blockquote>", page, re.S)
    (folder / "report.html").unlink()
    assert run_cli("demo", "--out", folder, "--steps", STEPS).exit_code == 0
    # The metrics hold each step's time: a step done again would not take the same nanoseconds.
    assert {path: path.read_bytes() for path in kept} == before
    page = (folder / "report.html").read_text()
    assert re.findall("<blockquote>.*?</blockquote>", page, re.S) == samples


@pytest.mark.usefixtures("_tiny")
def test_measured_caches_are_those_of_the_model() -> None:
    config = preset("nano").model_copy(update={"vocab_size": 8})
    model = init_weights(HybridModel(config), seed=0).eval()
    costs = context.measure_contexts({"one": model, "other": model})
    assert list(costs) == ["one", "other"]
    for points in costs.values():
        assert [point.context_tokens for point in points] == list(CONTEXTS)
        assert all(point.step_s > 0 for point in points)
        for point in points:
            state = empty_state(
                config, 1, point.context_tokens + 1, device=model.device, dtype=torch.float32
            )
            tensors = [tensor for layer in state for tensor in vars(layer).values()]
            assert point.cache_bytes == sum(tensor.nbytes for tensor in tensors)
