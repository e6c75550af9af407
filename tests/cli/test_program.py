"""The `sevenfold` program: each command's result, its exit codes, its one-line errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import TinyRun, exit_code, run_cli

from sevenfold.cli import main
from sevenfold.engine import LLM, SamplingParams
from sevenfold.models.accounting import WeightFormat
from sevenfold.models.checkpoint import detect_format

COMMANDS = ["demo", "data", "train", "generate", "serve", "inspect", "convert", "bench"]
PROMPT = "the river held its"


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS), ["data", "prepare"], ["bench", "cpu"]]
)
def test_help_at_each_level(command: list[str]) -> None:
    result = run_cli(*command, "--help")
    assert result.exit_code == 0
    assert f"Usage: root {' '.join(command)}".rstrip() in result.output
    if not command:
        assert [name for name in COMMANDS if f" {name} " not in result.output] == []


def test_help_names_every_command_that_there_is() -> None:
    assert sorted(main.COMMANDS) == sorted(COMMANDS)


def test_a_misspelt_command_is_told_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("trian") == 2
    assert "Did you mean 'train'?" in capfd.readouterr().err


def test_serving_does_not_wait_for_what_training_needs() -> None:
    heavy = ["torch.distributed.tensor", "torch.distributed.checkpoint", "torch._dynamo"]
    heavy += ["sympy", "pyarrow"]
    script = f"""
import sys, torch, sevenfold.cli.serve
with torch.device("meta"):  # as a checkpoint is loaded
    sevenfold.HybridModel(sevenfold.preset("nano"))
print([m for m in {heavy} if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("command", [["nope"], ["train"], ["inspect", "--nope"], ["generate", "a"]])
def test_bad_usage(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*command) == 2
    said = capfd.readouterr()
    assert "Usage:" in said.err
    assert "Traceback" not in said.err


def test_data_prepare_says_what_it_wrote(tiny_run: TinyRun) -> None:
    manifest = json.loads((tiny_run.data / "manifest.json").read_text())
    for name in ("train", "validation"):
        split = manifest["splits"][name]
        line = f"{name}: {split['num_documents']} documents, {split['num_tokens']:,} tokens, "
        assert line + f"{split['num_bytes']:,} bytes of text" in tiny_run.prepared.output
    documents = [manifest["splits"][name]["num_documents"] for name in ("train", "validation")]
    assert sum(documents) == 40
    assert f"written to {tiny_run.data}" in tiny_run.prepared.output


def test_data_prepare_refuses_what_has_no_effect(
    tmp_path: Path, tiny_run: TinyRun, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("some text")
    tokenizer = ("--tokenizer", tiny_run.data / "tokenizer.json", "--vocab-size", "300")
    assert exit_code("data", "prepare", source, "--out", out, *tokenizer) == 2
    said = "vocab_size must not be set when tokenizer is given, got 300; remove it"
    assert capfd.readouterr().err == f"sevenfold: data prepare: {said}\n"
    assert not out.exists()


def test_train_says_where_the_model_lies_and_goes_on_from_there(tiny_run: TinyRun) -> None:
    assert f"Done: 4 steps, model in {tiny_run.checkpoint}" in tiny_run.trained.output
    assert "step 4/4" in tiny_run.trained.output
    lines = (tiny_run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    again = run_cli("train", tiny_run.run_file)
    assert f"The run is complete: 4 steps, model in {tiny_run.checkpoint}" in again.output
    assert (tiny_run.folder / "metrics.jsonl").read_text().splitlines() == lines


def test_train_set_overrides_a_key(tiny_run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "other"
    result = run_cli("train", tiny_run.run_file, "--set", "run.steps=1", "--set", f"run.out={out}")
    assert result.exit_code == 0
    assert f"Done: 1 steps, model in {out / 'final'}" in result.output
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr = 0.01", "lrr = 0.01", "optimizer.lrr is not a known key; did you mean optimizer.lr?"),
        (
            "head_dim = 8",
            "head_dims = 8",
            "model: head_dims is not a known key; did you mean",
        ),
        ('preset = "nano"', 'preset = "nanno"', "preset must be"),
        ("tokens_per_step = 64", "tokens_per_step = 65", "must be a multiple of seq_len = 32"),
        ("[run]", "[run", "must be TOML"),
    ],
)
def test_a_run_file_with_a_fault(
    tiny_run: TinyRun,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    old: str,
    new: str,
    said: str,
) -> None:
    text = tiny_run.run_file.read_text()
    assert old in text
    run = tmp_path / "run.toml"
    run.write_text(text.replace(old, new))
    for command in ("train", "inspect"):
        assert exit_code(command, run) == 2
        error = capfd.readouterr().err
        assert error.startswith("sevenfold: ")
        assert error.count("\n") == 1
        assert said in error


def generated(checkpoint: Path, *options: str) -> str:
    result = run_cli("generate", checkpoint, PROMPT, "--max-tokens", "12", *options)
    assert result.exit_code == 0, result.output
    return result.output


def test_generate_prints_prompt_and_continuation(tiny_run: TinyRun) -> None:
    llm = LLM(tiny_run.checkpoint)
    cases = {
        ("--temperature", "0"): SamplingParams(max_tokens=12, temperature=0.0),
        ("--seed", "3"): SamplingParams(max_tokens=12, temperature=0.8, seed=3),
        ("--seed", "3", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.1"): SamplingParams(
            max_tokens=12, temperature=0.8, seed=3, top_k=5, top_p=0.9, min_p=0.1
        ),
        ("--temperature", "9", "--seed", "3", "--min-p", "0.9"): SamplingParams(
            max_tokens=12, temperature=9.0, seed=3, min_p=0.9
        ),
        ("--seed", "3", "--stop", "e", "--stop", "o"): SamplingParams(
            max_tokens=12, temperature=0.8, seed=3, stop=("e", "o")
        ),
        ("--temperature", "0", "--repetition-penalty", "1.5"): SamplingParams(
            max_tokens=12, temperature=0.0, repetition_penalty=1.5
        ),
    }
    for options, params in cases.items():
        [done] = llm.generate([PROMPT], params)
        said = generated(tiny_run.checkpoint, *options)
        assert said == PROMPT + done.text + "\n"
        assert generated(tiny_run.checkpoint, *options) == said
    assert generated(tiny_run.checkpoint, "--seed", "3") != generated(
        tiny_run.checkpoint, "--seed", "4"
    )


@pytest.mark.parametrize("weights", ["int8", "int8-experts", "fp8"])
def test_generate_from_8_bit_weights(tiny_run: TinyRun, weights: WeightFormat) -> None:
    llm = LLM(tiny_run.checkpoint, weights=weights)
    [done] = llm.generate([PROMPT], SamplingParams(max_tokens=12, temperature=0))
    options = ("--temperature", "0", "--weights", weights)
    assert generated(tiny_run.checkpoint, *options) == PROMPT + done.text + "\n"


def test_generate_in_another_dtype(tiny_run: TinyRun) -> None:
    options = ("--dtype", "float32", "--temperature", "0")
    assert generated(tiny_run.checkpoint, *options) == generated(
        tiny_run.checkpoint, "--temperature", "0"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "0", "--top-p", "0.9"], "top_p must be left out at temperature 0"),
        (["--temperature", "0", "--seed", "1"], "seed must be left out at temperature 0"),
        (["--top-p", "1.5"], "top_p must be valid: Input should be less than or equal to 1"),
        (["--max-tokens", "0"], "max_tokens must be valid"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--weights", "int4"], "weights must be"),
        (["--max-tokens", "1000"], "must fit into max_position_embeddings = 256"),
    ],
)
def test_generate_with_options_that_break_a_rule(
    tiny_run: TinyRun, options: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("generate", tiny_run.checkpoint, PROMPT, *options) == 2
    error = capfd.readouterr().err
    plain = " ".join(error.replace("│", " ").split())  # usage errors come in a frame
    assert said in plain
    assert "Traceback" not in error


def test_generate_from_an_empty_prompt(
    tiny_run: TinyRun, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("generate", tiny_run.checkpoint, "") == 2
    assert "prompt must have at least one token" in capfd.readouterr().err


def test_failures_are_one_line_and_exit_1(
    tiny_run: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_run.checkpoint, bare)
    (bare / "tokenizer.json").unlink()
    failing = {
        ("generate", tmp_path / "missing", PROMPT): "missing must be a checkpoint folder",
        ("generate", bare, PROMPT): "tokenizer.json must exist to generate text; copy the tokeniz",
        ("convert", tmp_path / "missing", tmp_path / "a", "--to", "hf"): "missing",
        ("inspect", tmp_path): "config.json",
        ("data", "prepare", tmp_path / "missing", "--out", tmp_path / "b"): "missing",
    }
    for arguments, said in failing.items():
        assert exit_code(*arguments) == 1, arguments
        error = capfd.readouterr().err
        assert error.startswith("sevenfold: "), arguments
        assert error.count("\n") == 1, arguments
        assert said in error


def test_convert_there_and_back_bit_for_bit(tiny_run: TinyRun, tmp_path: Path) -> None:
    there, back = tmp_path / "hf", tmp_path / "back"
    result = run_cli("convert", tiny_run.checkpoint, there, "--to", "hf")
    assert result.output == f"{tiny_run.checkpoint} (sevenfold) -> {there} (hf)\n"
    assert detect_format(there) == "hf"
    assert run_cli("convert", there, back, "--to", "sevenfold").exit_code == 0
    for file in tiny_run.checkpoint.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    assert generated(back, "--seed", "5") == generated(tiny_run.checkpoint, "--seed", "5")


def test_the_installed_program_keeps_the_exit_code() -> None:
    """One process, which takes seconds; the rest of this file runs in this one."""
    program = Path(sys.executable).with_name("sevenfold")
    done = subprocess.run(
        [program, "inspect", "nanno"], capture_output=True, text=True, check=False, timeout=100
    )
    said = "target must be a known name, got 'nanno'; did you mean 'nano'?"
    where = "a target is a preset, a checkpoint folder or a run file"
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", f"sevenfold: {said}; {where}\n")
