"""GuideLLM against a served checkpoint: a load that somebody else generates, on loopback."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from process_helpers import serving

NEW_TOKENS = 24
WORDS = 60
# Each ends after so many requests, or seconds, whichever is first.
MAX_S = 120
PROFILES = {
    "one at a time": ("kind=synchronous", 16),
    "4 at a time": ("kind=concurrent,streams=4", 48),
    "16 at a time": ("kind=concurrent,streams=16", 96),
    "poisson, 4 a second": ("kind=poisson,rate=4", 48),
    "all at once": ("kind=throughput,max_concurrency=64", 128),
}


def write_prompts(file: Path, text: str, num: int) -> None:
    """Write prompts of 60 words, none of which begins as another does."""
    words = text.split()
    with file.open("w", encoding="utf-8") as out:
        for n in range(num):
            prompt = " ".join(words[WORDS * n : WORDS * (n + 1)])
            out.write(json.dumps({"prompt": prompt, "output_tokens_count": NEW_TOKENS}) + "\n")


def load(
    checkpoint: Path, program: str, folder: Path, text: str, *options: str
) -> list[dict[str, Any]]:
    """Serve a checkpoint and let GuideLLM ask it by every profile.

    Args:
        checkpoint: its folder.
        program: the path of guidellm.
        folder: for what it reads and writes.
        text: prose, of which prompts are made.
        options: of the server.

    Returns:
        A case for each profile, for a record.
    """
    cases = []
    write_prompts(folder / "prompts.jsonl", text, num=256)
    with serving(checkpoint, "--model-name", "model", *options) as served:
        for name, (profile, num) in PROFILES.items():
            httpx.post(f"{served.url}/reset_prefix_cache", json={}).raise_for_status()
            made = _run(program, served.url, folder, profile, num)
            cases.append({"case": name} | _case(made))
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    name = "sevenfold_http_responses_total"
    answered = [line for line in lines if line.startswith(f'{name}{{route="/v1/chat/completions"')]
    assert all('status="200"' in line for line in answered), answered
    assert "sevenfold_outputs_under_way 0.0" in lines
    return cases


def _run(program: str, url: str, folder: Path, profile: str, num: int) -> Mapping[str, Any]:
    out = folder / "guidellm.json"
    command = [program, "run", "--disable-progress", "--profile", profile]
    command += ["--backend", f"kind=openai_http,target={url},model=model"]
    command += ["--constraint", f"kind=max_requests,count={num}"]
    command += ["--constraint", f"kind=max_duration,seconds={MAX_S}"]
    command += ["--data", f"kind=json_file,path={folder / 'prompts.jsonl'}"]
    command += ["--output", f"kind=json,path={out}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment.pop("PYTHONPATH", None)
    subprocess.run(command, check=True, env=environment, timeout=4 * MAX_S)
    [benchmark] = json.loads(out.read_text())["benchmarks"]
    return benchmark["metrics"]


def _case(metrics: Mapping[str, Any]) -> dict[str, Any]:
    def at(name: str, percent: str) -> float:
        return round(metrics[name]["successful"]["percentiles"][percent], 1)

    totals = metrics["request_totals"]
    new_tokens = metrics["output_token_count"]["successful"]["total_sum"]
    assert new_tokens == NEW_TOKENS * totals["successful"], "each answer has what was asked for"
    return {
        "answered": totals["successful"],
        "failed": totals["errored"],
        "left": totals["incomplete"],  # GuideLLM hangs up on what runs when it has enough
        "requests_per_s": round(metrics["requests_per_second"]["successful"]["mean"], 2),
        "output_tokens_per_s": round(metrics["output_tokens_per_second"]["successful"]["mean"], 1),
        "first_token_p50_ms": at("time_to_first_token_ms", "p50"),
        "first_token_p95_ms": at("time_to_first_token_ms", "p95"),
        "inter_token_p50_ms": at("inter_token_latency_ms", "p50"),
        "inter_token_p95_ms": at("inter_token_latency_ms", "p95"),
    }
