"""How long a fresh machine's first prompts take, with a warm-up and without.

python benchmarks/gpu/first_prompt.py OUT.json [PRESET] [TOKENS]

Each row is a process of its own: "cold" with an empty folder for what Triton compiles, "kept" with
the folder that the process before it has filled.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import sevenfold as sf
from sevenfold.bench.record import write_record
from sevenfold.bench.serving.sides import Serving
from sevenfold.models import HybridModel, init_weights, preset

GPU = torch.device("cuda")
NEW_TOKENS = 16


def measure(name: str, length: int, warm_up: bool) -> dict:
    """Seconds of the warm-up, of the first prompts, and what of the GPU is taken then."""
    with GPU:
        model = init_weights(HybridModel(preset(name)), seed=0, drawn_on=GPU)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    free = torch.cuda.mem_get_info()[0]
    llm = sf.LLM(sf.TextModel(model, Serving(model, memory_bytes=1 << 30).source.tokenizer),
                 memory_bytes=8 << 30, warm_up=False)  # fmt: skip
    lines, began = [], time.perf_counter()
    if warm_up:
        llm._driver._engine.warm_up(lines.append)
    row = {"warm_up_s": time.perf_counter() - began, "lines": lines}
    params = sf.SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    most = model.config.vocab_size
    for n, tokens in (("first", length), ("second", length + 1), ("short", 20), ("third", length)):
        prompt = torch.randint(most, (tokens,), generator=generator).tolist()
        began = time.perf_counter()
        deltas = llm.stream(prompt, params)
        next(deltas)
        row[f"{n}_token_s"] = time.perf_counter() - began
        for _ in deltas:
            continue
        row[f"{n}_output_s"] = time.perf_counter() - began
    torch.cuda.synchronize()
    row["taken_bytes"] = free - torch.cuda.mem_get_info()[0]
    row["reserved_bytes"] = torch.cuda.memory_reserved()
    return row


def main() -> None:
    if sys.argv[1] == "one":
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "warm")))
        return
    out, rows = Path(sys.argv[1]), []
    name, tokens = (*sys.argv[2:], *("bench-2b", "2000")[len(sys.argv) - 2 :])
    for how in ("warm", "lazy"):
        with tempfile.TemporaryDirectory() as cache:
            for start in ("cold", "kept"):
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, __file__, "one", name, tokens, how],
                    env=os.environ | {"TRITON_CACHE_DIR": cache},
                    stdout=subprocess.PIPE, text=True, check=True,
                )  # fmt: skip
                row = {"case": f"{how}, {start}", "process_s": time.perf_counter() - began}
                rows.append(row | json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
                write_record(out, f"python {' '.join(sys.argv)}", rows, device=GPU)


if __name__ == "__main__":
    main()
