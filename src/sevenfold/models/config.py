"""What a hybrid model is: every size and rule, in the Hugging Face spelling."""

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sevenfold.config import StrictModel

LayerType = Literal["linear_attention", "full_attention", "sliding_attention"]
Positive = Annotated[int, Field(ge=1)]
Coefficient = Annotated[float, Field(ge=0)]


class MoEConfig(StrictModel):
    """A mixture of experts in place of the dense feed-forward.

    capacity_factor c drops, in training only, what an expert gets beyond
    ceil(c * tokens * num_experts_per_tok / num_local_experts); None drops nothing.
    """

    num_local_experts: Positive
    num_experts_per_tok: Positive = 2
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    router_aux_loss_coef: Coefficient = 0.01
    router_z_loss_coef: Coefficient = 0.0
    shared_intermediate_size: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok must not exceed num_local_experts = "
                f"{self.num_local_experts}, got {self.num_experts_per_tok}"
            )
        return self


class ModelConfig(StrictModel):
    """A hybrid decoder.

    Each layer, with x the stream and f its mixer or feed-forward:

        u = RMSNorm(x)
        y = alpha * u + beta * f(u)     under post_norm (DeepNorm, as released)
        y = alpha * x + beta * f(u)     under pre_norm
    """

    vocab_size: Positive
    hidden_size: Positive
    layer_types: tuple[LayerType, ...] = Field(min_length=1)
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    intermediate_size: Positive
    moe: MoEConfig | None = None
    rotary_dim: Annotated[int, Field(ge=0, multiple_of=2)]
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    sliding_window: Positive | None = None
    norm_placement: Literal["post_norm", "pre_norm"] = "post_norm"
    full_attn_alpha_factor: float = 1.0
    full_attn_beta_factor: float = 1.0
    linear_attn_alpha_factor: float = 1.0
    linear_attn_beta_factor: float = 1.0
    mlp_alpha_factor: float = 1.0
    mlp_beta_factor: float = 1.0
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    linear_attn_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    linear_attn_norm_groups: Positive = 1
    initialization: Literal["xavier_deepnorm", "normal"] = "xavier_deepnorm"
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    tie_word_embeddings: bool = False
    max_position_embeddings: Positive = 8192
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads = "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        if self.num_attention_heads % self.linear_attn_norm_groups:
            raise ValueError(
                f"linear_attn_norm_groups must divide num_attention_heads = "
                f"{self.num_attention_heads}, got {self.linear_attn_norm_groups}"
            )
        if self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim must not exceed head_dim = {self.head_dim}, got {self.rotary_dim}"
            )
        slides = "sliding_attention" in self.layer_types
        if slides != (self.sliding_window is not None):
            rule = "be given with" if slides else "be left out without"
            raise ValueError(
                f"sliding_window must {rule} sliding_attention layers, got {self.sliding_window}"
            )
        return self

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_types)

    def count(self, layer_type: LayerType) -> int:
        """Number of layers of one type."""
        return Counter(self.layer_types)[layer_type]

    def residual_factors(self, layer_type: LayerType) -> tuple[float, float]:
        """Alpha and beta of a mixer's residual."""
        if layer_type == "linear_attention":
            return self.linear_attn_alpha_factor, self.linear_attn_beta_factor
        return self.full_attn_alpha_factor, self.full_attn_beta_factor
