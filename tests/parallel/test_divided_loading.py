"""A rank loads its part of a checkpoint alone, and LLM starts ranks that serve one."""

from pathlib import Path

import pytest
import torch
from parallel_generation import CHAIN, VOCAB_SIZE, byte_tokenizer, model_of

import sevenfold as sf
from sevenfold.config import ConfigError
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


def test_ranks_that_do_not_divide_the_model(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="tensor must divide num_attention_heads"):
        load_divided_model(checkpoint, ParallelConfig(tensor=7), 0, device=CPU, dtype=None)
    with pytest.raises(ConfigError, match="tensor_parallel must be 1 or more, got 0"):
        sf.LLM(checkpoint, tensor_parallel=0)
    with pytest.raises(ConfigError, match="weights must be left out with tensor_parallel"):
        sf.LLM(checkpoint, tensor_parallel=2, weights="int8")
    with pytest.raises(ConfigError, match="device must be cpu or cuda with tensor_parallel"):
        sf.LLM(checkpoint, tensor_parallel=2, device="meta")


@pytest.mark.slow
def test_an_llm_of_two_ranks_gives_the_tokens_of_one(checkpoint: Path) -> None:
    params = sf.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    found = []
    for num_ranks in (1, 2):
        llm = sf.LLM(checkpoint, tensor_parallel=num_ranks, memory_bytes=4 << 20, speculation=CHAIN)
        found.append([one.token_ids for one in llm.generate(PROMPTS, params)])
        llm.close()
    assert found[0] == found[1]
    assert all(max(tokens) < VOCAB_SIZE for tokens in found[0])
