"""Check and time an engine of two ranks beside one of one: greedy tokens, decoding, prefill.

python benchmarks/gpu/tensor_parallel.py OUT.json              (bench-2b on two GPUs, NCCL)
python benchmarks/gpu/tensor_parallel.py OUT.json bench-2b cuda int8       (weights in 8 bits)
python benchmarks/gpu/tensor_parallel.py OUT.json nano cpu     (on two processes, gloo)

Weights are random and lie in a folder for the time. A token of two ranks may be another than one
rank's only where one rank's model finds it as good within the rounding of its logits.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

import sevenfold as sf
from sevenfold.bench.record import write_record
from sevenfold.bench.serving.agreement import check_tokens
from sevenfold.models import HybridModel, init_weights, preset
from sevenfold.models.checkpoint import save_model

RANKS = (1, 2)


@dataclass
class Work:
    """checked: tokens of prompts. batches: decoded side by side. prefill: tokens of a prompt."""

    checked: tuple[int, ...]
    checked_tokens: int
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    prefill: int
    repeats: int
    memory_bytes: int


WORK = {
    "cuda": Work((3, 200, 1000, 3001), 64, (1, 64), 512, 129, 8192, 5, 8 << 30),
    "cpu": Work((3, 40), 4, (1, 3), 20, 5, 200, 2, 64 << 20),
}


def save(name: str, device: str, folder: Path) -> None:
    """A checkpoint of random weights."""
    with torch.device(device):
        model = init_weights(HybridModel(preset(name)), seed=0, drawn_on=torch.device(device))
    save_model(model.to(torch.bfloat16 if device == "cuda" else torch.float32), folder)
    Tokenizer(BPE()).save(str(folder / "tokenizer.json"))


class Prompts:
    """Random prompts, none of which has been cached."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size, self._random = vocab_size, torch.Generator().manual_seed(0)

    def of(self, *lengths: int) -> list[list[int]]:
        most = self._vocab_size
        return [torch.randint(most, (n,), generator=self._random).tolist() for n in lengths]


def generate(llm: sf.LLM, prompts: list[list[int]], num_tokens: int) -> list[tuple[int, ...]]:
    params = sf.SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return [one.token_ids for one in llm.generate(prompts, params)]


def seconds(llm: sf.LLM, prompts: list[list[int]], num_tokens: int) -> float:
    began = time.perf_counter()
    generate(llm, prompts, num_tokens)
    return time.perf_counter() - began


def check(llms: dict[int, sf.LLM], prompts: Prompts, work: Work) -> dict:
    texts = prompts.of(*work.checked)
    alone, together = (generate(llms[n], texts, work.checked_tokens) for n in RANKS)
    for text, tokens in zip(texts, together, strict=True):
        check_tokens(llms[1].model, text, tokens)
    same = sum(a == b for one, two in zip(alone, together, strict=True)
               for a, b in zip(one, two, strict=True))  # fmt: skip
    return {
        "case": "greedy tokens",
        "tokens": len(texts) * work.checked_tokens,
        "same": same,
        "same_outputs": sum(one == two for one, two in zip(alone, together, strict=True)),
    }


def decode(llms: dict[int, sf.LLM], prompts: Prompts, work: Work, batch: int) -> dict:
    """Seconds of a step: those of all tokens, less those of the first alone."""
    steps = {n: [] for n in RANKS}
    for _ in range(1 + work.repeats):  # the first warms up
        for n, llm in llms.items():
            spent = [
                seconds(llm, prompts.of(*[work.prompt_tokens] * batch), num_tokens)
                for num_tokens in (1, work.new_tokens)
            ]
            steps[n].append((spent[1] - spent[0]) / (work.new_tokens - 1))
    return {"case": f"decode, batch {batch}", "batch": batch} | compared(steps, batch)


def prefill(llms: dict[int, sf.LLM], prompts: Prompts, work: Work) -> dict:
    times = {n: [] for n in RANKS}
    for _ in range(1 + work.repeats):
        for n, llm in llms.items():
            times[n].append(seconds(llm, prompts.of(work.prefill), 1))
    return {"case": f"prefill, {work.prefill} tokens"} | compared(times, work.prefill)


def compared(times: dict[int, list[float]], tokens: int) -> dict:
    one, two = (statistics.median(times[n][1:]) for n in RANKS)
    return {
        "one_s": one,
        "two_s": two,
        "ratio": one / two,
        "one_tokens_per_s": tokens / one,
        "two_tokens_per_s": tokens / two,
    }


def main() -> None:
    out = Path(sys.argv[1])
    name, device, weights = (*sys.argv[2:], *("bench-2b", "cuda", None)[len(sys.argv) - 2 :])
    work, rows = WORK[device], []
    command = f"python benchmarks/gpu/tensor_parallel.py {' '.join(sys.argv[1:])}"

    def note(row: dict) -> None:
        rows.append(row)
        print(row, flush=True)
        write_record(out, command, rows, device=torch.device(device))

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        save(name, device, checkpoint)
        llms = {}
        try:
            for n in RANKS:
                began = time.perf_counter()
                llms[n] = sf.LLM(
                    checkpoint,
                    device=device,
                    weights=weights,
                    tensor_parallel=n,
                    memory_bytes=work.memory_bytes,
                )
                note({"case": f"start of {n}", "s": time.perf_counter() - began})
            prompts = Prompts(preset(name).vocab_size)
            note(check(llms, prompts, work))
            for batch in work.batches:
                note(decode(llms, prompts, work, batch))
            note(prefill(llms, prompts, work))
        finally:
            for llm in llms.values():
                llm.close()


if __name__ == "__main__":
    main()
