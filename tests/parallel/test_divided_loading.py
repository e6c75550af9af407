"""A rank loads its part of a checkpoint alone, and LLM starts ranks that serve one."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from parallel_generation import CHAIN, VOCAB_SIZE, byte_tokenizer, model_of

import sevenfold as sf
from sevenfold.config import ConfigError
from sevenfold.engine.quantised_weights import (
    QuantisedLinear,
    exchange_weights,
    load_quantised_model,
)
from sevenfold.models.accounting import WeightFormat
from sevenfold.models.checkpoint import load_model, save_model
from sevenfold.parallel import ParallelConfig, load_divided_model
from sevenfold.parallel.parts import parts_of, tensor_slice

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3] * 30, [9], list(range(20, 60))]


CASES = [("lfs", False, "sevenfold"), ("lfs", True, "sevenfold"), ("lf", True, "minimax")]


@pytest.fixture(scope="module", params=CASES, ids=["dense", "experts", "published"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "model"
    layers, experts, kind = request.param
    save_model(model_of(layers, experts), folder, format=kind)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_reads_its_part_of_every_matrix(num_ranks: int, checkpoint: Path) -> None:
    whole = dict(load_model(checkpoint).named_parameters())
    parallel = ParallelConfig(tensor=num_ranks)
    for rank in range(num_ranks):
        divided = load_divided_model(checkpoint, parallel, rank, device=CPU, dtype=None)
        found = dict(divided._model.named_parameters())
        assert found.keys() == whole.keys()
        for name, part in found.items():
            assert torch.equal(part, tensor_slice(whole[name], parts_of(name), rank, num_ranks))


@pytest.mark.parametrize("weights", get_args(WeightFormat))
def test_a_rank_quantises_its_part_as_one_process_does(
    weights: WeightFormat, checkpoint: Path
) -> None:
    """Codes and scales of every rank are slices of those of the whole model, bit for bit."""
    if weights.endswith("experts") and load_model(checkpoint).config.moe is None:
        pytest.skip("a model without experts")
    whole = load_quantised_model(checkpoint, weights)
    matrices = dict(_matrices(whole))
    assert matrices
    for num_ranks in (2, 4):
        parallel, rest = ParallelConfig(tensor=num_ranks), dict(whole.named_parameters())
        for rank in range(num_ranks):
            divided = load_divided_model(
                checkpoint,
                parallel,
                rank,
                device=CPU,
                dtype=None,
                exchange=partial(exchange_weights, weights=weights),
            )
            found = dict(_matrices(divided._model))
            assert found.keys() == matrices.keys()
            for name, part in found.items():
                parts = parts_of(name)
                codes = tensor_slice(matrices[name].codes.float(), parts, rank, num_ranks)
                assert torch.equal(part.codes.float(), codes)
                scale = matrices[name].scale
                if parts.tensor != scale.dim():  # else columns are divided, and all share a scale
                    scale = tensor_slice(scale, parts, rank, num_ranks)
                assert torch.equal(part.scale, scale)
            for name, part in divided._model.named_parameters():
                assert torch.equal(part, tensor_slice(rest[name], parts_of(name), rank, num_ranks))


def _matrices(model: sf.HybridModel) -> Iterator[tuple[str, QuantisedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            yield name, module


def test_ranks_that_do_not_divide_the_model(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="tensor must divide num_attention_heads"):
        load_divided_model(checkpoint, ParallelConfig(tensor=7), 0, device=CPU, dtype=None)
    with pytest.raises(ConfigError, match="tensor_parallel must be 1 or more, got 0"):
        sf.LLM(checkpoint, tensor_parallel=0)
    with pytest.raises(ConfigError, match="device must be cpu or cuda with tensor_parallel"):
        sf.LLM(checkpoint, tensor_parallel=2, device="meta")


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int8"])
def test_an_llm_of_two_ranks_gives_the_tokens_of_one(
    checkpoint: Path, weights: WeightFormat | None
) -> None:
    params = sf.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    found = []
    for num_ranks in (1, 2):
        llm = sf.LLM(
            checkpoint,
            tensor_parallel=num_ranks,
            weights=weights,
            memory_bytes=4 << 20,
            speculation=CHAIN,
        )
        found.append([one.token_ids for one in llm.generate(PROMPTS, params)])
        llm.close()
    assert found[0] == found[1]
    assert all(max(tokens) < VOCAB_SIZE for tokens in found[0])


LEFT_OPEN = """
import sys
import sevenfold as sf
llm = sf.LLM(sys.argv[1], tensor_parallel=2, memory_bytes=4 << 20)
llm.generate([[1, 2, 3]], sf.SamplingParams(max_tokens=2, temperature=0.0))
print(llm._ranks._processes[0].pid)
"""


@pytest.mark.slow
def test_ranks_end_with_a_process_that_does_not_close(checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, str(checkpoint)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert not Path(f"/proc/{int(done.stdout)}").exists()
