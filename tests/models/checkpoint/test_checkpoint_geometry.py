"""The 456B model's names and sizes, from shapes alone."""

import math
from collections import Counter

import pytest
import torch
from test_checkpoint_config import TEXT_01

from sevenfold.models.checkpoint.parts import list_parts, parameter_shapes, stored_dtype

NUM_PARAMETERS = 456_089_655_296
NUM_TENSORS = 8_243
# Of the published index: bf16 weights, fp32 routers.
TOTAL_BYTES = 912_210_767_872


def test_the_published_geometry() -> None:
    parts = list_parts(TEXT_01, "minimax")
    assert len({part.name for part in parts}) == len(parts) == NUM_TENSORS
    assert sum(math.prod(part.shape) for part in parts) == NUM_PARAMETERS
    sizes = (
        math.prod(part.shape) * stored_dtype(part.parameter, torch.bfloat16).itemsize
        for part in parts
    )
    assert sum(sizes) == TOTAL_BYTES
    assert [part.name for part in list_parts(TEXT_01, "hf")] == [part.name for part in parts]


def test_the_published_names_and_shapes() -> None:
    shapes = {part.name: part.shape for part in list_parts(TEXT_01, "minimax")}
    linear, full = "model.layers.6", "model.layers.7"
    expected = {
        "model.embed_tokens.weight": (200064, 6144),
        "model.norm.weight": (6144,),
        "lm_head.weight": (200064, 6144),
        f"{linear}.input_layernorm.weight": (6144,),
        f"{linear}.post_attention_layernorm.weight": (6144,),
        f"{linear}.self_attn.qkv_proj.weight": (24576, 6144),
        f"{linear}.self_attn.output_gate.weight": (8192, 6144),
        f"{linear}.self_attn.norm.weight": (8192,),
        f"{linear}.self_attn.out_proj.weight": (6144, 8192),
        f"{full}.self_attn.q_proj.weight": (8192, 6144),
        f"{full}.self_attn.k_proj.weight": (1024, 6144),
        f"{full}.self_attn.v_proj.weight": (1024, 6144),
        f"{full}.self_attn.o_proj.weight": (6144, 8192),
        f"{full}.block_sparse_moe.gate.weight": (32, 6144),
        f"{full}.block_sparse_moe.experts.31.w1.weight": (9216, 6144),
        f"{full}.block_sparse_moe.experts.31.w2.weight": (6144, 9216),
        f"{full}.block_sparse_moe.experts.31.w3.weight": (9216, 6144),
    }
    assert {name: shapes[name] for name in expected} == expected
    # A linear layer has 2 norms, 4 of the mixer, 1 router and 96 of experts, as has a full one.
    per_layer = Counter(".".join(name.split(".")[:3]) for name in shapes)
    assert {per_layer[f"model.layers.{i}"] for i in range(80)} == {103}


@pytest.mark.parametrize("to", ["sevenfold", "hf", "minimax"])
def test_parts_tile_every_parameter(to) -> None:
    shapes = parameter_shapes(TEXT_01)
    reached = dict.fromkeys(shapes, 0)
    for part in list_parts(TEXT_01, to):
        assert part.start == reached[part.parameter], part
        reached[part.parameter] = part.stop
    assert reached == {name: math.prod(shape) for name, shape in shapes.items()}
