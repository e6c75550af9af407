"""The parity matrix in bf16: what may differ where, on any device."""

from dataclasses import astuple
from functools import cache

import torch
from covering import covering
from engine_helpers import tiny_model
from matrix import CASES, Case, Run, engine_of, nearly, outspoken
from near_ties import Judge
from tokenizers import Tokenizer

from sevenfold.models import HybridModel

# Widths that every kernel takes, and a page as large as a state: memory is cut as on the CPU.
WIDTHS = {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
WIDTHS |= {"intermediate_size": 64, "rotary_dim": 32, "max_position_embeddings": 200}
LAYERS = "lsfsf"
# A GPU records batch-invariant steps always.
POSSIBLE = [case for case in CASES if case.graphs or not case.invariant]
QUICK = [Case(*values) for values in covering([astuple(case) for case in POSSIBLE], 2)]


@cache
def models(device: str) -> tuple[HybridModel, HybridModel, Judge]:
    """The model, a smaller one that drafts, and who judges the model's outputs."""
    model = outspoken(tamed(tiny_model(LAYERS, **WIDTHS))).bfloat16()
    return model.to(device), nearly(model).to(device), Judge(model)


@cache
def alone(chunk_tokens: int, device: str, tokenizer: Tokenizer) -> list[list[int]]:
    """What batch-invariant mode gives each prompt when there is no other and no cache."""
    case = Case("plain", chunk_tokens, "alone", "ample", False, True, False, True)
    return outputs(run_of(case, device, tokenizer))[0]


def tamed(model: HybridModel) -> HybridModel:
    """Smaller weights of layers: with the fp32 tests' the rule would allow any token."""
    with torch.no_grad():
        for weight in model.layers.parameters():
            if weight.dim() > 1:
                weight *= 0.5
    return model


def outputs(run: Run) -> list[list[list[int]]]:
    return [[request.generated for request in turn] for turn in run.turns]


def run_of(case: Case, device: str, tokenizer: Tokenizer) -> Run:
    model, draft, _ = models(device)
    run = Run(case, engine_of(case, model, draft, tokenizer))
    run.run()
    return run


def check(case: Case, device: str, tokenizer: Tokenizer) -> Run:
    """Fail unless tokens are greedy but for near ties; in batch-invariant mode, all the same."""
    run, judge = run_of(case, device, tokenizer), models(device)[2]
    for request in run.requests.values():
        judge.check(request.prompt, request.generated)
    assert 2 * judge.num_decided > judge.num_tokens, "most tokens must leave no choice"
    if case.invariant:
        assert outputs(run) == [alone(case.chunk_tokens, device, tokenizer)] * 2
    run.check_effects()
    return run
