"""lm-eval against a server's URL, on tasks of local text, beside the same figures from `LLM`."""

import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from sevenfold.engine import LLM, SamplingParams

CHOICES = 4
MAX_TOKENS = 8
_CLOZE = """\
task: cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/cloze.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{begin}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
_ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rolling.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
_GOES_ON = """\
task: goes_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/cloze.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{begin}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: {max_tokens}, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
"""


def write_tasks(folder: Path, text: str, num: int) -> None:
    """Write three tasks over passages of a text: which of four goes on, how likely, what comes.

    Args:
        folder: for the tasks and their data.
        text: prose; every 400 characters of it make a passage.
        num: passages.
    """
    words = text.split()
    passages = [words[60 * n : 60 * n + 48] for n in range(num)]
    if len(passages[-1]) < 48:
        raise ValueError(f"text must have {60 * num} words, got {len(words)}")
    cloze = []
    for n, passage in enumerate(passages):
        ends = [" ".join(passages[(n + k) % num][40:]) for k in range(CHOICES)]
        label = n % CHOICES
        ends[0], ends[label] = ends[label], ends[0]
        cloze.append({"begin": " ".join(passage[:40]), "choices": ends, "label": label})
    rolling = [{"text": " ".join(passage)} for passage in passages]
    for name, rows in (("cloze", cloze), ("rolling", rolling)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for name, form in (("cloze", _CLOZE), ("rolling", _ROLLING), ("goes_on", _GOES_ON)):
        said = form.format(folder=folder, max_tokens=MAX_TOKENS)
        (folder / f"{name}.yaml").write_text(said, encoding="utf-8")


def run_lm_eval(
    program: str, url: str, folder: Path, *, chat: bool, tasks: Sequence[str], key: str
) -> dict[str, Any]:
    """Let lm-eval ask a server, and return its results and its samples by task."""
    model = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).json()
    kind, route = ("local-chat-completions", "chat/completions") if chat else (
        "local-completions", "completions")  # fmt: skip
    arguments = {
        "base_url": f"{url}/v1/{route}",
        "model": model["data"][0]["id"],
        "num_concurrent": 4,
        "max_retries": 1,
        "max_length": model["data"][0]["max_model_len"],
    }
    if not chat:
        arguments["auth_token"] = key
    out = folder / ("chat" if chat else "completions")
    command = [program, "--model", kind, "--tasks", ",".join(tasks), "--include_path", str(folder)]
    command += ["--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
    command += ["--output_path", str(out), "--log_samples", "--batch_size", "1"]
    command += ["--apply_chat_template"] if chat else []
    environment = os.environ | {"OPENAI_API_KEY": key, "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_DATASETS_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run(command, check=True, env=environment, timeout=900)
    [results] = out.rglob("results_*.json")
    samples = {
        task: [json.loads(line) for line in file.read_text().splitlines()]
        for task in tasks
        for file in out.rglob(f"samples_{task}_*.jsonl")
    }
    return {"results": json.loads(results.read_text())["results"], "samples": samples}


def log_likelihood(llm: LLM, context: Sequence[int], rest: Sequence[int]) -> float:
    """The log probability of tokens after others, by the engine in this process."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    [output] = llm.generate([[*context, *rest]], params)
    found = output.prompt_logprobs or ()
    return math.fsum(one.chosen for one in found[len(context) - 1 :])


def compare(llm: LLM, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Compute again what lm-eval was told; the largest differences of log probabilities.

    Returns:
        The largest difference for the choices and for whole passages, and the accuracy.
    """
    tokenizer = llm.tokenizer
    worst, right = 0.0, 0
    for one in samples["cloze"]:
        begin = one["doc"]["begin"]
        context = tokenizer.encode(begin, add_special_tokens=False).ids
        ours = []
        for choice, told in zip(one["doc"]["choices"], one["filtered_resps"], strict=True):
            whole = tokenizer.encode(f"{begin} {choice}", add_special_tokens=False).ids
            ours.append(log_likelihood(llm, context, whole[len(context) :]))
            worst = max(worst, abs(ours[-1] - float(told[0])))
        right += ours.index(max(ours)) == one["doc"]["label"]
    return {"largest difference": worst, "accuracy": right / len(samples["cloze"])}
