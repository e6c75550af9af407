"""One layer: a mixer and a feed-forward, each with its norm and residual."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sevenfold.models.batch import Batch
from sevenfold.models.config import ModelConfig
from sevenfold.models.feed_forward import MixtureOfExperts, SwiGLU
from sevenfold.models.layers import RMSNorm
from sevenfold.models.mixers import build_mixer
from sevenfold.models.padding import Padding
from sevenfold.models.router_stats import RouterCounts
from sevenfold.models.state import LayerState
from sevenfold.ops import post_rms_norm, residual_rms_norm


class Normed(NamedTuple):
    """A residual stream at a norm: u, normalised, and what the next residual adds to."""

    u: Tensor
    stream: Tensor


@dataclass(frozen=True)
class OverRanks:
    """How ranks that hold a block in equal parts come to one result.

    add: sums a tensor over them, in place, and returns it. num_ranks: how many there are.
    """

    add: Callable[[Tensor], Tensor]
    num_ranks: int


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
        # Of heads and widths that are divided, set by sevenfold.parallel; None where all are here.
        self.ranks: OverRanks | None = None

    def forward(
        self, x: Tensor, batch: Batch, state: LayerState | None
    ) -> tuple[Tensor, LayerState | None, RouterCounts | None]:
        """Run the block on x [B, T, hidden_size]."""
        u = self.input_layernorm(x)
        mixed, state = self.self_attn(u, batch, state)
        stream, (alpha, beta) = u if self.post_norm else x, self.mixer_factors
        norm = self.post_attention_layernorm
        u, x = residual_rms_norm(stream, mixed, norm.weight, norm.eps, alpha=alpha, beta=beta)
        x, counts = self._feed(x, u, batch.padding)
        return x, state, counts

    def mix(
        self, x: Tensor, batch: Batch, state: LayerState | None
    ) -> tuple[Tensor, LayerState | None]:
        """The block's first half: tokens exchange what they know."""
        u = self.input_layernorm(x)
        mixed, state = self.self_attn(u, batch, state)
        return self._residual(x, u, mixed, self.mixer_factors), state

    def mix_ends(
        self, x: Tensor, batch: Batch, state: LayerState, ends: Tensor
    ) -> tuple[Tensor, LayerState | None]:
        """As mix, of which only the tokens at `ends` leave, as [N, 1, hidden_size]; see infer."""
        u = self.input_layernorm(x)
        mixed, after = self._mixed_ends(u, batch, state, ends)
        stream = (u if self.post_norm else x).flatten(0, 1)[ends, None]
        return self._residual(stream, stream, mixed, self.mixer_factors), after

    def feed(self, x: Tensor) -> tuple[Tensor, RouterCounts | None]:
        """The block's second half: each token by itself."""
        return self._feed(x, self.post_attention_layernorm(x))

    def enter(self, x: Tensor) -> Normed:
        """Normalise what comes to the block from no other."""
        u = self.input_layernorm(x)
        return Normed(u, u if self.post_norm else x)

    def infer(
        self,
        normed: Normed,
        following: RMSNorm,
        batch: Batch,
        state: LayerState,
        ends: Tensor | None = None,
    ) -> tuple[Normed, LayerState | None]:
        """Run the block between norms, without a gradient: each is taken where its sum is made.

        Args:
            normed: what enters, normalised by the block's own input norm.
            following: the norm behind the block: the next one's, or the last.
            batch, state: as forward's.
            ends: [N], the last token of each sequence among all B * T; only these leave, as
                [N, 1, hidden_size]. None lets all leave.

        Returns:
            What leaves, and the state.
        """
        stream, norm = normed.stream, self.post_attention_layernorm
        if ends is None:
            mixed, after = self.self_attn(normed.u, batch, state)
        else:
            mixed, after = self._mixed_ends(normed.u, batch, state, ends)
            stream = stream.flatten(0, 1)[ends, None]
        normed = self._joined(stream, mixed, norm, self.mixer_factors)
        fed, _ = self._fed(normed.u)
        return self._joined(normed.stream, fed, following, self.mlp_factors), after

    def _mixed_ends(
        self, u: Tensor, batch: Batch, state: LayerState, ends: Tensor
    ) -> tuple[Tensor, LayerState | None]:
        mixer = self.self_attn
        # sevenfold.parallel replaces a mixer, or its forward, and knows nothing of ends.
        if "forward" in vars(mixer) or not hasattr(mixer, "mix_ends"):
            mixed, after = mixer(u, batch, state)
            return mixed.flatten(0, 1)[ends, None], after
        return mixer.mix_ends(u, batch, state, ends)  # pyright: ignore[reportCallIssue]

    def _joined(
        self, stream: Tensor, f: Tensor, norm: RMSNorm, factors: tuple[float, float]
    ) -> Normed:
        alpha, beta = factors
        if self.post_norm:
            u = post_rms_norm(stream, f, norm.weight, norm.eps, alpha=alpha, beta=beta)
            return Normed(u, u)
        u, x = residual_rms_norm(stream, f, norm.weight, norm.eps, alpha=alpha, beta=beta)
        return Normed(u, x)

    def feed_dense(self, u: Tensor) -> Tensor:
        """A dense feed-forward of u; sevenfold.train may stand in for it."""
        return self.mlp(u)

    def _feed(
        self, x: Tensor, u: Tensor, padding: Padding | None = None
    ) -> tuple[Tensor, RouterCounts | None]:
        fed, counts = self._fed(u, padding)
        return self._residual(x, u, fed, self.mlp_factors), counts

    def _fed(self, u: Tensor, padding: Padding | None = None) -> tuple[Tensor, RouterCounts | None]:
        if isinstance(self.mlp, MixtureOfExperts):
            return self.mlp(u, padding)
        return self.feed_dense(u), None

    def _residual(self, x: Tensor, u: Tensor, f: Tensor, factors: tuple[float, float]) -> Tensor:
        alpha, beta = factors
        stream = u if self.post_norm else x
        return torch.add(f if beta == 1.0 else beta * f, stream, alpha=alpha)
