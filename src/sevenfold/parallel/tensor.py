"""Tensor parallelism: heads, widths and vocabulary divided among ranks, for training and inference.

Each rank computes with its part of the weights on the same tokens. What enters a divided product is
copied (its gradient is summed), what leaves one is summed. The RMSNorm over all heads is exact: the
sum of squares is summed over the ranks. A model whose norm has groups (linear_attn_norm_groups)
has whole groups on each rank, which exchange nothing. Source: arXiv 1909.08053 (Megatron-LM).
"""

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from sevenfold.models import Batch, HybridModel, LayerState
from sevenfold.models.block import Block, OverRanks
from sevenfold.models.feed_forward import MixtureOfExperts, SwiGLU
from sevenfold.models.mixers import LightningAttention, SoftmaxAttention
from sevenfold.models.mixers.lightning import gated_group_norm
from sevenfold.models.padding import Padding
from sevenfold.ops import head_logits
from sevenfold.parallel.collectives import (
    copy_to_ranks,
    sum_for_parts,
    sum_in_place,
    sum_of_parts,
)
from sevenfold.parallel.layout import Layout
from sevenfold.parallel.parts import parts_of, tensor_slice
from sevenfold.parallel.pipeline import own_blocks
from sevenfold.parallel.vocabulary import vocabulary_cross_entropy


def divide_weights(model: HybridModel, layout: Layout) -> None:
    """Keep this rank's part of every matrix that divide_experts has not divided; names stay."""
    index, size = layout.place.tensor, layout.config.tensor
    for name, parameter in model.named_parameters():
        parts = parts_of(name)
        if parts.is_expert and layout.config.routes_tokens:
            continue
        own = tensor_slice(parameter.data, parts, index, size)
        parameter.data = own.clone(memory_format=torch.contiguous_format)


def divide_tensors(model: HybridModel, layout: Layout) -> None:
    """Compute with this rank's part of every matrix, and sum over ranks where the model needs it.

    The result computes what the plain model computes, in training and in inference. Its config then
    has the heads of one rank, so that states and caches are allocated for these alone.

    Args:
        model: with the weights of divide_weights; changed in place, on its final device.
        layout: with tensor above 1, whose degrees suit the model.
    """
    index, size = layout.place.tensor, layout.config.tensor
    group = layout.group("tensor")
    for block in own_blocks(model):
        _divide_mixer(block, index, size, group)
        _divide_mlp(block.mlp, layout.config.routes_tokens, group)
        if not layout.config.routes_tokens:
            block.ranks = OverRanks(partial(sum_in_place, group=group), size)
    start = index * (model.config.vocab_size // size)
    # Callables take the place of methods; a module keeps its parameters under their names.
    if isinstance(model.embed_tokens, nn.Embedding):
        embed = partial(_embed, model.embed_tokens, start, group)
        model.embed_tokens.forward = embed  # pyright: ignore[reportAttributeAccessIssue]
    model.cross_entropy = partial(_cross_entropy, model, start, group)
    model.logits = partial(_logits, model, group)
    heads = ("num_attention_heads", "num_key_value_heads")
    model.config = model.config.model_copy(
        update={name: getattr(model.config, name) // size for name in heads}
    )


def _divide_mixer(block: Block, index: int, size: int, group: dist.ProcessGroup) -> None:
    mixer = block.self_attn
    if isinstance(mixer, LightningAttention):
        block.self_attn = TensorLightning(mixer, index, size, group)
    elif isinstance(mixer, SoftmaxAttention):
        mixer.num_heads //= size
        mixer.num_kv_heads //= size
        mix = partial(_mix_in_parts, mixer.forward, group)
        mixer.forward = mix  # pyright: ignore[reportAttributeAccessIssue]


def _divide_mlp(mlp: MixtureOfExperts | SwiGLU, routes: bool, group: dist.ProcessGroup) -> None:
    if isinstance(mlp, SwiGLU):
        _divide_swiglu(mlp, group)
        return
    if not routes:
        mlp.routed = partial(_routed_in_parts, mlp.routed, group)
    if mlp.shared_mlp is not None:
        _divide_swiglu(mlp.shared_mlp, group)


class TensorLightning(nn.Module):
    """LightningAttention with H / size of its heads; its children have the same names."""

    def __init__(
        self, plain: LightningAttention, index: int, size: int, group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.qkv_proj, self.output_gate = plain.qkv_proj, plain.output_gate
        self.norm, self.out_proj = plain.norm, plain.out_proj
        self.group = group
        # The whole norm's one group lies on all ranks; else each has some of the groups.
        self.norm_groups = plain.norm_groups // size
        plain.num_heads //= size
        plain.log_decay = plain.log_decay.chunk(size)[index].clone()
        self.num_heads, self.log_decay = plain.num_heads, plain.log_decay
        self.project, self.attend = plain.project, plain.attend
        self._plain = [plain]  # in a list: its children are this module's

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # As in LightningAttention: the decay follows the weights to their device.
        super()._apply(fn, recurse)
        device = self.norm.weight.device
        if device.type != "meta":
            self.log_decay = self._plain[0].log_decay = self.log_decay.to(device)
        return self

    def forward(
        self, x: Tensor, batch: Batch, state: LayerState | None
    ) -> tuple[Tensor, LayerState | None]:
        """Mix x [B, T, hidden_size], the same on all ranks, as y is."""
        x = copy_to_ranks(x, self.group)
        q, k, v = self.project(x)
        o, state = self.attend(q, k, v, batch, state)  # pyright: ignore[reportArgumentType]
        o, gate = o.reshape(*x.shape[:2], -1), self.output_gate(x)
        if self.norm_groups:
            o = gated_group_norm(o, gate, self.norm, self.norm_groups)
        else:
            o = gated_norm_of_parts(o, gate, self.norm.weight, self.norm.eps, self.group)
        return sum_of_parts(self.out_proj(o), self.group), state


def gated_norm_of_parts(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, group: dist.ProcessGroup
) -> Tensor:
    """gated_rms_norm over channels that lie on several ranks.

        y = x * r * weight * sigmoid(gate)      r = (sum over ranks of x^2 / D + eps)^(-1/2)

    Args:
        x, gate: [..., D / ranks], this rank's channels.
        weight: [D / ranks].
        eps: > 0.
        group: the ranks.

    Returns:
        [..., D / ranks] in x's dtype; computed in fp32 at least.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = sum_for_parts(wide.square().sum(-1, keepdim=True), group)
    num_channels = x.shape[-1] * dist.get_world_size(group)
    y = wide * torch.rsqrt(squares / num_channels + eps) * weight
    return y.to(x.dtype) * torch.sigmoid(gate)


def _mix_in_parts(forward, group, x: Tensor, batch: Batch, state: LayerState | None):
    """Softmax attention of this rank's heads, summed after the output projection."""
    y, state = forward(copy_to_ranks(x, group), batch, state)
    return sum_of_parts(y, group), state


def _divide_swiglu(mlp: SwiGLU, group: dist.ProcessGroup) -> None:
    mlp.forward = partial(_swiglu_in_parts, mlp.forward, group)


def _swiglu_in_parts(forward, group: dist.ProcessGroup, x: Tensor) -> Tensor:
    return sum_of_parts(forward(copy_to_ranks(x, group)), group)


def _routed_in_parts(
    routed, group, tokens: Tensor, weights: Tensor, experts: Tensor, padding: Padding | None = None
) -> tuple[Tensor, Tensor]:
    """Experts of part of their width; tokens and weights get a part of their gradient from each."""
    tokens, weights = copy_to_ranks(tokens, group), copy_to_ranks(weights, group)
    y, kept = routed(tokens, weights, experts, padding)
    return sum_of_parts(y, group), kept


def _embed(embedding: nn.Embedding, start: int, group: dist.ProcessGroup, ids: Tensor) -> Tensor:
    """Look up ids whose rows lie on several ranks: each adds its own, the others zeros."""
    own = ids - start
    mine = (own >= 0) & (own < len(embedding.weight))
    rows = F.embedding(own.clamp(0, len(embedding.weight) - 1), embedding.weight)
    return sum_of_parts(rows * mine[..., None], group)


def _cross_entropy(
    model: HybridModel, start: int, group: dist.ProcessGroup, hidden: Tensor, labels: Tensor
) -> Tensor:
    hidden = copy_to_ranks(hidden, group)
    return vocabulary_cross_entropy(hidden, model.lm_head.weight, labels, start, group)


def _logits(model: HybridModel, group: dist.ProcessGroup, hidden: Tensor) -> Tensor:
    """Logits of the whole vocabulary, on all ranks."""
    part = head_logits(hidden, model.lm_head.weight)
    gathered = list(part.new_empty(dist.get_world_size(group), *part.shape))
    dist.all_gather(gathered, part.contiguous(), group=group)
    return torch.cat(gathered, -1)
