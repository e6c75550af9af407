"""What a model costs, against its own tensors, PyTorch's counter and hand-worked cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import CPU, MOE, tiny_config, tokens
from torch.utils.flop_counter import FlopCounterMode

from sevenfold.models import (
    HybridModel,
    KVState,
    LinearState,
    ModelConfig,
    MoEConfig,
    empty_state,
    init_weights,
    preset,
)
from sevenfold.models.accounting import (
    count_parameters,
    decode_bytes,
    decode_flops,
    kv_bytes,
    prefill_flops,
    state_bytes,
    state_crossover_tokens,
    training_flops,
)

MINIMAX = preset("minimax-text-01")
SHARED = MoEConfig(num_local_experts=3, num_experts_per_tok=1, shared_intermediate_size=5)
MOES = st.none() | st.builds(
    MoEConfig,
    num_local_experts=st.integers(2, 5),
    num_experts_per_tok=st.integers(1, 2),
    shared_intermediate_size=st.none() | st.integers(1, 9),
)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads = draw(st.integers(1, 3))
    return tiny_config(
        draw(st.text("lfs", min_size=1, max_size=5)),
        window=draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 12)),
        num_attention_heads=kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=draw(st.integers(2, 9)),
        rotary_dim=2,
        intermediate_size=draw(st.integers(1, 12)),
        moe=draw(MOES),
        tie_word_embeddings=draw(st.booleans()),
        norm_placement=draw(st.sampled_from(["post_norm", "pre_norm"])),
    )


def on_meta(config: ModelConfig) -> HybridModel:
    with torch.device("meta"):
        return HybridModel(config)


def numel(model: HybridModel, *parts: str) -> int:
    """Elements of the parameters whose name has one of some parts."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if any(part in name for part in parts))


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    model, counted = on_meta(config), count_parameters(config)
    assert numel(model, "") == counted.total
    assert numel(model, "embed_tokens") == counted.embedding
    assert numel(model, "lm_head") == counted.lm_head
    linear = ("qkv_proj", "output_gate", "out_proj")
    assert numel(model, *linear) == counted.linear_attention
    assert numel(model, ".q_proj", ".k_proj", ".v_proj", ".o_proj") == counted.softmax_attention
    assert numel(model, "mlp.gate.") == counted.router
    assert numel(model, "mlp.experts.") == counted.experts
    assert sum(p.numel() for p in model.parameters() if p.dim() == 1) == counted.norms
    parts = (counted.linear_attention, counted.softmax_attention, counted.router)
    matrices = sum(parts) + counted.experts + counted.dense_feed_forward
    assert counted.total == counted.embedding + counted.lm_head + matrices + counted.norms
    idle = 0
    if config.moe is not None:
        unused = config.moe.num_local_experts - config.moe.num_experts_per_tok
        idle = counted.experts * unused // config.moe.num_local_experts
    assert counted.active == matrices - idle


def test_published_parameters() -> None:
    counted = count_parameters(MINIMAX)
    assert (counted.total, counted.active) == (456_089_655_296, 45_943_357_440)
    assert counted.embedding == counted.lm_head == 200_064 * 6144
    assert counted.experts == 80 * 32 * 3 * 6144 * 9216


def seen_by_pytorch(config: ModelConfig, num_tokens: int) -> int:
    """FLOPs of the plain matrix products, which attention, batched over heads, is not among."""
    model = init_weights(HybridModel(config), seed=0).double().eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(tokens(1, num_tokens))
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm]


@pytest.mark.parametrize("moe", [None, MOE, SHARED], ids=["dense", "experts", "shared"])
@pytest.mark.parametrize("layers", ["l", "f", "s", "llf", "lsf"])
def test_dense_flops_are_those_that_pytorch_counts(layers: str, moe: MoEConfig | None) -> None:
    config, num_tokens = tiny_config(layers, moe=moe), 9
    mixing = sum(mixing_flops(config, kind, num_tokens) for kind in config.layer_types)
    assert prefill_flops(config, num_tokens) - mixing == seen_by_pytorch(config, num_tokens)


def mixing_flops(config: ModelConfig, kind: str, num_tokens: int) -> int:
    """Token by token: every pair costs 2 D for q k and 2 D for p v, the state 4 D^2 a head."""
    H, D = config.num_attention_heads, config.head_dim
    if kind == "linear_attention":
        return num_tokens * H * 4 * D * D
    reach = config.sliding_window if kind == "sliding_attention" else num_tokens
    assert reach is not None
    return sum(H * 4 * D for i in range(num_tokens) for j in range(i + 1) if i - j < reach)


@settings(max_examples=40, deadline=None)
@given(config=configs(), num_tokens=st.integers(1, 30))
def test_flops_token_by_token(config: ModelConfig, num_tokens: int) -> None:
    mixing = sum(mixing_flops(config, kind, num_tokens) for kind in config.layer_types)
    head = config.vocab_size * config.hidden_size
    dense = 2 * num_tokens * (count_parameters(config).active + head)
    assert prefill_flops(config, num_tokens) == dense + mixing
    decoded = sum(decode_flops(config, context) for context in range(num_tokens))
    assert decoded == prefill_flops(config, num_tokens)


def test_hand_worked_attention() -> None:
    """Two heads of six: 48 FLOPs a pair. Eight tokens see 36 pairs, a window of three 21."""
    full, window, linear = (tiny_config(kind, window=3) for kind in "fsl")
    # q and o 2 x 8 x 12, k and v 2 x 8 x 6; gate, up and down 3 x 8 x 10; head 19 x 8
    dense = 2 * (288 + 240 + 152)
    assert prefill_flops(full, 8) == 8 * dense + 36 * 48
    assert prefill_flops(window, 8) == 8 * dense + 21 * 48
    # q, k, v, gate, out 5 x 8 x 12; the state 4 x 2 x 6 x 6
    assert prefill_flops(linear, 8) == 8 * (2 * (480 + 240 + 152) + 288)
    # The ninth token sees nine, or three; the state takes no notice.
    assert decode_flops(full, 8) == dense + 9 * 48
    assert decode_flops(window, 8) == dense + 3 * 48
    assert decode_flops(linear, 8) == decode_flops(linear, 10**6) == 2 * 872 + 288


def test_training_is_three_forwards_of_each_document() -> None:
    config = tiny_config("lsf")
    parts = prefill_flops(config, 5) + prefill_flops(config, 11)
    assert training_flops(config, [5, 11]) == 3 * parts
    assert training_flops(config, [16]) > 3 * parts  # two documents see fewer pairs than one
    assert training_flops(config, []) == 0


@settings(max_examples=40, deadline=None)
@given(
    config=configs(),
    context=st.integers(1, 20),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_bytes_are_those_of_the_state(
    config: ModelConfig, context: int, dtype: torch.dtype
) -> None:
    state = empty_state(config, 1, context, device=CPU, dtype=dtype)
    linear = sum(layer.kv.nbytes for layer in state if isinstance(layer, LinearState))
    assert state_bytes(config) == linear
    softmax = [layer for layer in state if isinstance(layer, KVState)]
    # A window's ring is allocated whole; bytes count the places that context fills.
    filled = sum((x[:, :context]).numel() for layer in softmax for x in (layer.k, layer.v))
    assert kv_bytes(config, context, dtype.itemsize) == filled * dtype.itemsize


def test_published_memory() -> None:
    """KV 5.4 GB at 2^17 tokens, 42.9 GB at 2^20; 293.6 MB of state; 40,960 B of KV a token."""
    assert kv_bytes(MINIMAX, 1) == 40_960
    assert f"{kv_bytes(MINIMAX, 2**17) / 1e9:.1f}" == "5.4"
    assert f"{kv_bytes(MINIMAX, 2**20) / 1e9:.1f}" == "42.9"
    assert f"{kv_bytes(MINIMAX, 4_000_000) / 1e9:.0f}" == "164"
    assert state_bytes(MINIMAX) == 70 * 64 * 128 * 128 * 4
    assert f"{state_bytes(MINIMAX) / 1e6:.1f}" == "293.6"
    all_full = MINIMAX.model_copy(update={"layer_types": ("full_attention",) * 80})
    assert f"{kv_bytes(all_full, 2**20) / 1e9:.1f}" == "343.6"
    assert state_bytes(all_full) == 0


def test_crossover_of_minimax() -> None:
    assert state_crossover_tokens(MINIMAX) == 1024
    assert state_crossover_tokens(MINIMAX, element_bytes=4) == 512


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_crossover_is_where_an_all_softmax_twin_takes_as_much(config: ModelConfig) -> None:
    """Windows count as full on both sides: only the linear layers are weighed."""
    layers = tuple("l" if kind == "linear_attention" else "f" for kind in config.layer_types)
    own = tiny_config("".join(layers), **sizes(config))
    twin = tiny_config("f" * len(layers), **sizes(config))

    def saved(context: int) -> int:
        return kv_bytes(twin, context) - kv_bytes(own, context) - state_bytes(own)

    crossover = state_crossover_tokens(config)
    if "l" not in layers:
        assert crossover is None
        return
    assert crossover is not None
    assert saved(crossover) >= 0 > saved(crossover - 1)


def sizes(config: ModelConfig) -> dict[str, int]:
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "rotary_dim")
    return {name: getattr(config, name) for name in names}


def test_hand_worked_crossover() -> None:
    """One linear layer: 2 x 6 x 6 x 4 = 288 B of state against 2 x 6 x 2 = 24 B a token."""
    assert state_bytes(tiny_config("lf")) == 288
    assert kv_bytes(tiny_config("lf"), 1) == 24
    assert state_crossover_tokens(tiny_config("lf")) == 12
    assert state_crossover_tokens(tiny_config("llf")) == 12
    assert state_crossover_tokens(tiny_config("lf"), element_bytes=4) == 6
    # 3 x 7 x 7 x 4 = 588 B against 28: exactly 21; heads of 5: 300 against 20, 15.
    assert state_crossover_tokens(tiny_config("lf", num_attention_heads=3, head_dim=7)) == 21
    # 2 x 5 x 5 x 4 = 200 B against 60 a token with three heads of keys: 3.3, so from the fourth.
    wide = tiny_config("lf", num_attention_heads=3, num_key_value_heads=3, head_dim=5)
    assert (state_bytes(wide), kv_bytes(wide, 1)) == (300, 60)
    assert state_crossover_tokens(wide) == 5
    odd = tiny_config("lf", num_attention_heads=3, num_key_value_heads=3, head_dim=4)
    assert (state_bytes(odd), kv_bytes(odd, 1), state_crossover_tokens(odd, 6)) == (192, 48, 2)
    assert state_crossover_tokens(tiny_config("fs")) is None


def test_decode_bytes_by_hand() -> None:
    """Layer l 5 x 8 x 12, layer f 288, each feed-forward 240, head 152; once each, in bf16."""
    config = tiny_config("lf")
    weights = 480 + 288 + 2 * 240 + 152
    assert decode_bytes(config, 100) == 2 * weights + 2 * 288 + 100 * 24
    assert decode_bytes(config, 100, 4) == 4 * weights + 2 * 288 + 100 * 48
    some = tiny_config("lf", moe=MOE)  # two experts of three, and a router of 3 x 8
    assert decode_bytes(some, 0) == 2 * (480 + 288 + 2 * (2 * 240 + 24) + 152) + 2 * 288
