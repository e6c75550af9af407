"""The hybrid decoder: embedding, blocks, final norm, head."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sevenfold.models.batch import Batch
from sevenfold.models.block import Block
from sevenfold.models.chunked import chunks, pays_by_chunks, run_by_chunks
from sevenfold.models.config import ModelConfig
from sevenfold.models.layers import Linear, RMSNorm
from sevenfold.models.router_stats import RouterCounts, RouterStats, router_stats
from sevenfold.models.state import LayerState, empty_layer_state
from sevenfold.models.stepping import feed_by_rows, pays_by_rows, run_by_rows
from sevenfold.ops import (
    head_logits,
    head_logits_into,
    linear_cross_entropy,
    room_for_logits,
)


class HiddenResult(NamedTuple):
    """Output of HybridModel.hidden.

    hidden: [B, T, hidden_size], normalised, ready for the head.
    state: the state handed in, advanced; None if none came in.
    router: one entry for each layer with experts, in training; else empty.
    """

    hidden: Tensor
    state: tuple[LayerState, ...] | None
    router: tuple[RouterCounts, ...]


class HybridModel(nn.Module):
    """A decoder whose layers are any mix of linear, full and sliding attention.

    Its parameters are created uninitialised: see init_weights and load_model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Made by itself it draws its weight, for which PyTorch, on the meta device, imports its
        # compiler: 3 s of each load.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, the router's apart."""
        return next(self.parameters()).dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute the logits of whole rows.

        Args:
            input_ids: [B, T] int64, 0 to vocab_size - 1; each row is one sequence.

        Returns:
            [B, T, vocab_size], fp32 (fp64 for an fp64 model).
        """
        weight, room = self.lm_head.weight, None
        if len(weight) == self.config.vocab_size:  # not one rank's part of it
            room = room_for_logits(input_ids.numel(), weight)
        hidden = self.hidden(input_ids).hidden
        return self.logits(hidden) if room is None else head_logits_into(room, hidden, weight)

    def hidden(
        self,
        input_ids: Tensor,
        batch: Batch | None = None,
        state: tuple[LayerState, ...] | None = None,
    ) -> HiddenResult:
        """Run the decoder up to the head.

        Args:
            input_ids: [B, T] int64.
            batch: what the tokens belong to; None means that each row is one sequence.
            state: of the batch's sequences, as empty_state or an earlier call returned it; None
                starts afresh and keeps nothing.

        Returns:
            Hidden vectors, state and what the routers counted.

        Raises:
            ValueError: the ids' shape is not the batch's.
        """
        if batch is None:
            batch = Batch.rows(*input_ids.shape, device=input_ids.device)
        if input_ids.shape != batch.positions.shape:
            shapes = (list(batch.positions.shape), list(input_ids.shape))
            raise ValueError("input_ids must have the batch's shape {}, got {}".format(*shapes))
        x = self.embed_tokens(input_ids)
        if state is not None and not self.training:
            if pays_by_rows(x, batch):
                x, advanced = self._by_rows(self.layers, x, batch, state)
                return HiddenResult(self.norm(x), advanced, ())
            if not torch.is_grad_enabled():
                return self._infer(x, batch, state)
        states: list[LayerState | None] = []
        router = []
        by_chunks = state is None and not self.training and pays_by_chunks(x, batch)
        for i, layer in enumerate(self.layers):
            if by_chunks:
                run_by_chunks(layer, x, self._empty_state(i, input_ids))
                continue
            x, after, counts = layer(x, batch, None if state is None else state[i])
            states.append(after)
            router += [] if counts is None else [counts]
        advanced = None if state is None else tuple(s for s in states if s is not None)
        if not by_chunks:
            return HiddenResult(self.norm(x), advanced, tuple(router))
        for _, part in chunks(x):
            part.copy_(self.norm(part))
        return HiddenResult(x, None, ())

    @torch.no_grad()
    def hidden_at_ends(
        self, input_ids: Tensor, batch: Batch, state: tuple[LayerState, ...], ends: Tensor
    ) -> HiddenResult:
        """Run the decoder, and of the last layer's tokens only those that are asked for.

        The last layer's keys, values and states are of all tokens, as hidden's; of others it
        computes no query, no expert and no product behind its mixer. In inference.

        Args:
            input_ids, batch, state: as hidden's.
            ends: [N] int64, the place of each sequence's last token among all B * T.

        Returns:
            As hidden, with hidden vectors [N, 1, hidden_size].
        """
        x = self.embed_tokens(input_ids)
        if not pays_by_rows(x, batch):
            return self._infer(x, batch, state, ends)
        blocks: list[Block] = list(self.layers)  # pyright: ignore[reportAssignmentType]
        x, states = self._by_rows(blocks[:-1], x, batch, state[:-1])
        x, after = blocks[-1].mix_ends(x, batch, state[-1], ends)
        states = (*states, state[-1] if after is None else after)
        return HiddenResult(self.norm(feed_by_rows(blocks[-1], x)), states, ())

    @staticmethod
    def _by_rows(
        layers: Iterable[nn.Module], x: Tensor, batch: Batch, state: tuple[LayerState, ...]
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """Run layers on a few tokens."""
        states = []
        for layer, before in zip(layers, state, strict=True):
            x, after = run_by_rows(layer, x, batch, before)
            states.append(after)
        return x, tuple(states)

    def _infer(
        self,
        x: Tensor,
        batch: Batch,
        state: tuple[LayerState, ...],
        ends: Tensor | None = None,
    ) -> HiddenResult:
        """Run all layers and the last norm; each norm is taken where the sum before it is made."""
        blocks: list[Block] = list(self.layers)  # pyright: ignore[reportAssignmentType]
        following = [*(block.input_layernorm for block in blocks[1:]), self.norm]
        normed, states = blocks[0].enter(x), []
        for block, norm, before in zip(blocks, following, state, strict=True):
            asked = ends if block is blocks[-1] else None
            normed, after = block.infer(normed, norm, batch, before, asked)
            states.append(after)
        return HiddenResult(normed.u, tuple(s for s in states if s is not None), ())

    def _empty_state(self, layer: int, input_ids: Tensor) -> LayerState:
        """The state of one layer before the rows' first token."""
        layer_type, (B, T) = self.config.layer_types[layer], input_ids.shape
        where = {"device": input_ids.device, "dtype": self.dtype}
        return empty_layer_state(self.config, layer_type, B, T, **where)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden [..., hidden_size] to logits [..., vocab_size], in fp32 at least."""
        return head_logits(hidden, self.lm_head.weight)

    def router_stats(self, counts: Sequence[RouterCounts]) -> RouterStats | None:
        """Take the statistics of some layers' routers; None of none.

        sevenfold.parallel may stand in for this.
        """
        moe = self.config.moe
        return router_stats(counts, moe.num_experts_per_tok) if moe and counts else None

    def cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum the head's cross-entropy over the tokens that have a label; nats, fp32 at least."""
        return linear_cross_entropy(hidden, self.lm_head.weight, labels)
