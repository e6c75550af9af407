"""lm-eval against a server's URL, on tasks of local text, beside the same figures from `LLM`."""

import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from process_helpers import serving

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


def compare(llm: LLM, samples: Sequence[Mapping[str, Any]]) -> tuple[list[tuple], float]:
    """Compute the choices' log probabilities again, in this process.

    Returns:
        Each of lm-eval's with ours, and our accuracy.
    """

    def encode(text: str) -> list[int]:
        return llm.tokenizer.encode(text, add_special_tokens=False).ids

    pairs, right = [], 0
    for one in samples:
        begin, ours = one["doc"]["begin"], []
        context = encode(begin)
        for choice, told in zip(one["doc"]["choices"], one["filtered_resps"], strict=True):
            ours.append(log_likelihood(llm, context, encode(f"{begin} {choice}")[len(context) :]))
            pairs.append((float(told[0]), ours[-1]))
        right += ours.index(max(ours)) == one["doc"]["label"]
    return pairs, right / len(samples)


def evaluate(
    checkpoint: Path, program: str, folder: Path, text: str, num: int, key: str
) -> list[dict[str, Any]]:
    """Serve a checkpoint, let lm-eval ask it, and compute the same in this process.

    Args:
        checkpoint: its folder.
        program: the path of lm_eval.
        folder: for what lm-eval reads and writes.
        text, num: as write_tasks takes them.
        key: for the server to ask for.

    Returns:
        One case for each of lm-eval's model types, for a record.
    """
    write_tasks(folder, text, num)
    keys = folder / "keys"
    keys.write_text(key)
    options = ("--api-keys-file", str(keys), "--memory-gib", "0.25")
    with serving(checkpoint, *options) as program_of_ours:
        ask = {"program": program, "url": program_of_ours.url, "folder": folder, "key": key}
        told = run_lm_eval(**ask, chat=False, tasks=("cloze", "rolling", "goes_on"))
        chat = run_lm_eval(**ask, chat=True, tasks=("goes_on",))
    llm = LLM(checkpoint)
    pairs, accuracy = compare(llm, told["samples"]["cloze"])
    rolling = told["samples"]["rolling"]
    found = told["results"]
    assert found["cloze"]["acc,none"] == accuracy, "the URL's accuracy is the model's"
    return [
        {
            "case": "local-completions",
            "checkpoint": checkpoint.parent.name,
            "documents": num,
            "log likelihoods": len(pairs),
            "largest difference from LLM": max(abs(a - b) for a, b in pairs),
            "largest magnitude": max(abs(b) for _, b in pairs),
            "accuracy": found["cloze"]["acc,none"],
            "accuracy by LLM": accuracy,
            "bits a byte": found["rolling"]["bits_per_byte,none"],
            "rolling passages": len(rolling),
            "generated": len(told["samples"]["goes_on"]),
        },
        {"case": "local-chat-completions", "generated": len(chat["samples"]["goes_on"])},
    ]
