"""Peak anonymous memory (RssAnon) of loading, saving and converting a model of 200 MB.

Mapped pages of the files (RssFile) are not counted: the kernel takes them back when it needs them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The threads of the BLAS and the allocator's own slack: far below one tenth of the model.
SLACK_BYTES = 12_000_000

MEASURE = """
import gc, json, sys, threading, time
from pathlib import Path
import torch
from sevenfold.engine.quantised_weights import load_quantised_model
from sevenfold.models import HybridModel, ModelConfig, MoEConfig
from sevenfold.models.checkpoint import convert, load_model, save_model

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def config(hidden_size, num_local_experts):
    return ModelConfig(
        vocab_size=512, hidden_size=hidden_size, layer_types=("linear_attention", "full_attention"),
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, rotary_dim=32,
        intermediate_size=2 * hidden_size, moe=MoEConfig(num_local_experts=num_local_experts),
    )

def anonymous():
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

class Peak:
    def __enter__(self):
        gc.collect()
        self.before = self.peak = anonymous()
        self.done = False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while not self.done:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.001)
    def __exit__(self, *_):
        self.peak = max(self.peak, anonymous())
        self.done = True
        self.thread.join()

def rehearse(path):
    # Loads what a process loads once: libraries, buffers, allocator arenas.
    with torch.no_grad():
        model = HybridModel(config(64, 2))
        [p.fill_(1.0) for p in model.parameters()]
    save_model(model, path / "small", overwrite=True)
    load_model(path / "small", dtype=torch.bfloat16)
    load_quantised_model(path / "small", "int8")
    convert(path / "small", path / "small-hf", to="hf", overwrite=True)

rehearse(folder)
results = {}
with Peak() as peak:
    model = HybridModel(config(1024, 8)).bfloat16()
    with torch.no_grad():
        [p.fill_(0.5) for p in model.parameters()]
size = sum(p.numel() * p.element_size() for p in model.parameters())
with Peak() as peak:
    save_model(model, folder / "a", max_shard_bytes=60_000_000)
results["save"] = peak.peak - peak.before
del model
for there, name in (("hf", "b"), ("sevenfold", "c")):
    source = {"b": "a", "c": "b"}[name]
    with Peak() as peak:
        convert(folder / source, folder / name, to=there)
    results[f"convert to {there}"] = peak.peak - peak.before
for name in ("a", "b", "c"):
    with Peak() as peak:
        model = load_model(folder / name)
    results[f"load {name}"] = peak.peak - peak.before
    del model
for name in ("b", "c"):
    with Peak() as peak:
        model = load_quantised_model(folder / name, "int8")
    results[f"load {name} in int8"] = peak.peak - peak.before
    quantised = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    results["int8"] = quantised
    del model
with Peak() as peak:
    model = load_model(folder / "b", dtype=torch.float32)
results["load as float32"] = peak.peak - peak.before
print(json.dumps({"size": size, "results": results}))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, int]]:
    if not Path("/proc/self/status").is_file():
        pytest.skip("RssAnon is Linux's")
    folder = tmp_path_factory.mktemp("memory")
    command = [sys.executable, "-c", MEASURE, str(folder)]
    # glibc's own first value. Named, it stays: else glibc keeps freed tensors of tens of MB, which
    # count as held, or are used again and do not count.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["size"], answer["results"]


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_loading_takes_the_model_and_little_more(measured, name: str) -> None:
    size, results = measured
    assert 0.9 * size <= results[f"load {name}"] <= 1.15 * size + SLACK_BYTES, results


@pytest.mark.parametrize("name", ["b", "c"])
def test_quantising_takes_the_quantised_model_and_a_few_blocks(measured, name: str) -> None:
    """Five blocks of 1M elements in fp32 lie beside it, whatever the size of the model."""
    size, results = measured
    assert results["int8"] < 0.6 * size
    peak = results[f"load {name} in int8"]
    assert 0.9 * results["int8"] <= peak <= results["int8"] + 5 * (4 << 20) + SLACK_BYTES, results


def test_loading_to_a_wider_dtype_takes_the_wide_model(measured) -> None:
    size, results = measured
    assert results["load as float32"] <= 1.15 * 2 * size + SLACK_BYTES, results


@pytest.mark.parametrize("step", ["save", "convert to hf", "convert to sevenfold"])
def test_writing_takes_next_to_nothing(measured, step: str) -> None:
    size, results = measured
    assert size > 200_000_000
    assert results[step] <= 0.1 * size + SLACK_BYTES, results
