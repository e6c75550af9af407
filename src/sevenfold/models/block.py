"""One layer: a mixer and a feed-forward, each with its norm and residual."""

import torch
from torch import Tensor, nn

from sevenfold.models.batch import Batch
from sevenfold.models.config import ModelConfig
from sevenfold.models.feed_forward import MixtureOfExperts, RouterStats, SwiGLU
from sevenfold.models.layers import RMSNorm
from sevenfold.models.mixers import build_mixer
from sevenfold.models.state import LayerState
from sevenfold.ops import residual_rms_norm


class Block(nn.Module):
    """A mixer and a feed-forward, each with its norm and residual (see ModelConfig)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.post_norm = config.norm_placement == "post_norm"
        self.mixer_factors = config.residual_factors(config.layer_types[layer])
        self.mlp_factors = (config.mlp_alpha_factor, config.mlp_beta_factor)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = build_mixer(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MixtureOfExperts | SwiGLU
        if config.moe is not None:
            self.mlp = MixtureOfExperts(config, config.moe)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, batch: Batch, state: LayerState | None
    ) -> tuple[Tensor, LayerState | None, RouterStats | None]:
        """Run the block on x [B, T, hidden_size]."""
        u = self.input_layernorm(x)
        mixed, state = self.self_attn(u, batch, state)
        stream, (alpha, beta) = u if self.post_norm else x, self.mixer_factors
        norm = self.post_attention_layernorm
        u, x = residual_rms_norm(stream, mixed, norm.weight, norm.eps, alpha=alpha, beta=beta)
        x, stats = self._feed(x, u)
        return x, state, stats

    def mix(
        self, x: Tensor, batch: Batch, state: LayerState | None
    ) -> tuple[Tensor, LayerState | None]:
        """The block's first half: tokens exchange what they know."""
        u = self.input_layernorm(x)
        mixed, state = self.self_attn(u, batch, state)
        return self._residual(x, u, mixed, self.mixer_factors), state

    def feed(self, x: Tensor) -> tuple[Tensor, RouterStats | None]:
        """The block's second half: each token by itself."""
        return self._feed(x, self.post_attention_layernorm(x))

    def feed_dense(self, u: Tensor) -> Tensor:
        """A dense feed-forward of u; sevenfold.train may stand in for it."""
        return self.mlp(u)

    def _feed(self, x: Tensor, u: Tensor) -> tuple[Tensor, RouterStats | None]:
        stats = None
        if isinstance(self.mlp, MixtureOfExperts):
            fed, stats = self.mlp(u)
        else:
            fed = self.feed_dense(u)
        return self._residual(x, u, fed, self.mlp_factors), stats

    def _residual(self, x: Tensor, u: Tensor, f: Tensor, factors: tuple[float, float]) -> Tensor:
        alpha, beta = factors
        stream = u if self.post_norm else x
        return torch.add(f if beta == 1.0 else beta * f, stream, alpha=alpha)
