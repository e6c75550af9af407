"""A tiny run through the program: text, data, a trained checkpoint."""

import pytest
import torch
from cli_helpers import TinyRun, run_cli

WORDS = "the river held its colour while nine grey herons stood quite still beside old stones"
RUN = """
[run]
out = "{out}"
steps = 4
num_threads = 1

[data]
path = "{data}"
seq_len = 32

[model]
preset = "nano"
vocab_size = 300
hidden_size = 16
layer_types = ["linear_attention", "full_attention"]
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
rotary_dim = 4
intermediate_size = 16
max_position_embeddings = 256
moe = {{ num_local_experts = 2 }}

[optimizer]
lr = 0.01

[batch]
tokens_per_step = 64
"""


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("program")
    source, data, out = folder / "text", folder / "data", folder / "run"
    source.mkdir()
    words = WORDS.split()
    for i in range(40):
        picked = (words[(i * j + i) % len(words)] for j in range(5 + 7 * (i % 9)))
        (source / f"{i:02}.txt").write_text(" ".join(picked), encoding="utf-8")
    arguments = ("--out", data, "--vocab-size", "300", "--validation-fraction", "0.2")
    prepared = run_cli("data", "prepare", source, *arguments)
    run_file = folder / "run.toml"
    run_file.write_text(RUN.format(out=out, data=data), encoding="utf-8")
    trained = run_cli("train", run_file)
    for result in (prepared, trained):
        assert result.exit_code == 0, (result.output, result.exception)
    [final] = (path.parent for path in out.rglob("tokenizer.json"))
    return TinyRun(prepared, trained, data, run_file, out, final)
