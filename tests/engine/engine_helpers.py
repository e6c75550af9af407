"""Tiny models for the engine, and what they generate without any cache."""

from functools import cache
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer

from sevenfold.models import HybridModel, LayerType, ModelConfig, MoEConfig, init_weights

LETTERS: dict[str, LayerType] = {
    "l": "linear_attention",
    "f": "full_attention",
    "s": "sliding_attention",
}
VOCAB_SIZE = 300
EOS = "<|endoftext|>"
MOE = MoEConfig(num_local_experts=3, num_experts_per_tok=2)
PROMPTS = ["the old heron", "x", "stones beside the quiet river, and herons"]


def tiny_model(
    layers: str = "lsf", dtype: torch.dtype = torch.float32, **fields: object
) -> HybridModel:
    """layers: one letter each, l linear, f full, s sliding; weights large enough to differ."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "layer_types": tuple(LETTERS[letter] for letter in layers),
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 12,
        "rotary_dim": 4,
        "sliding_window": 4 if "s" in layers else None,
        "max_position_embeddings": 100,
    }
    model = init_weights(HybridModel(ModelConfig(**(sizes | fields))), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(2 * noise * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval().requires_grad_(False)


@cache
def shared_model(layers: str) -> HybridModel:
    """A tiny model of whose outputs uncached keeps what one test after another asks for."""
    return tiny_model(layers, max_position_embeddings=200, moe=MOE if layers == "llsl" else None)


def with_eos(model: HybridModel, token: int | None) -> HybridModel:
    """The same weights under another end-of-sequence token."""
    other = HybridModel(model.config.model_copy(update={"eos_token_id": token}))
    other.load_state_dict(model.state_dict())
    return other.eval().requires_grad_(False)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# By model and prompt: many tests ask for the same texts. A model's weights stay as they are.
_TRUTHS: WeakKeyDictionary[HybridModel, dict[tuple[int, ...], list[int]]] = WeakKeyDictionary()


def uncached(model: HybridModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens, the whole row computed anew for each."""
    known = _TRUTHS.setdefault(model, {}).setdefault(tuple(prompt), [])
    while len(known) < num_tokens:
        known.append(int(model(torch.tensor([[*prompt, *known]]))[0, -1].argmax()))
    return known[:num_tokens]
