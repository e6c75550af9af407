"""What a layout costs each rank: bytes and seconds, by arithmetic alone.

Weights and moments are counted parameter by parameter on the meta device, and are exact. What a
step holds besides is that of models.training_memory, for the layers, heads and widths of a rank.
Times are estimates, and say of what they are made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sevenfold.models import ModelConfig
from sevenfold.models.accounting import mixing_flops, prefill_flops, training_flops
from sevenfold.models.training_memory import (
    BATCH_TOKEN_BYTES,
    HeldWeights,
    TrainingMemory,
    kept_bytes,
    training_memory,
)
from sevenfold.optim import OptimizerConfig
from sevenfold.parallel.config import ParallelConfig
from sevenfold.parallel.copies import Copies
from sevenfold.parallel.holding import held_by_rank, layer_of, optimizer_share, rank_layers

_FP32_BYTES, _BF16_BYTES = 4, 2


@dataclass(frozen=True)
class Work:
    """What one step does.

    seq_len: tokens of a row, each taken as one document: the dearest case.
    step_rows: rows of a step, over all ranks.
    micro_batch_rows: rows that go through the model at once, over all ranks.
    element_bytes: of activations in products; 2 for bf16.
    stream_bytes: of a value of the residual stream.
    recompute_every: every k-th block is computed again in the backward; None keeps all.
    keeps_attention: whether those blocks keep what softmax attention over all tokens gave.
    """

    seq_len: int
    step_rows: int
    micro_batch_rows: int
    element_bytes: int
    stream_bytes: int = _FP32_BYTES
    recompute_every: int | None = None
    keeps_attention: bool = True

    @property
    def num_micro_batches(self) -> int:
        """Passes through the model in a step."""
        return math.ceil(self.step_rows / self.micro_batch_rows)

    def recomputed_share(self, num_layers: int) -> float:
        """Return the share of a model's blocks that are computed again."""
        every = self.recompute_every
        return 0.0 if every is None else math.ceil(num_layers / every) / num_layers


@dataclass(frozen=True)
class Rates:
    """What one rank reaches; the defaults are an H200 in nodes of eight.

    flops_per_s: of products, sustained.
    near_bytes_per_s, far_bytes_per_s: that a rank sends within its node, and beyond it.
    node_ranks: ranks of a node.
    """

    flops_per_s: float = 0.5 * 989e12
    near_bytes_per_s: float = 300e9
    far_bytes_per_s: float = 40e9
    node_ranks: int = 8


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on a rank: products, and what each kind of group exchanges."""

    compute_s: float
    exchange_s: dict[str, float]

    @property
    def overlapped_s(self) -> float:
        """If every exchange hides behind products, or they behind it."""
        return max(self.compute_s, sum(self.exchange_s.values()))

    @property
    def serial_s(self) -> float:
        """If nothing overlaps."""
        return self.compute_s + sum(self.exchange_s.values())


@dataclass(frozen=True)
class _Unit:
    """Elements of what fully_shard gathers at once: whole on a rank, and divided."""

    whole: int
    divided: int


def rank_memory(
    model: ModelConfig, parallel: ParallelConfig, work: Work, optimizer: OptimizerConfig
) -> TrainingMemory:
    """Count what a rank holds at the highest point of a step's backward.

    Args:
        model: the model.
        parallel: degrees that suit it.
        work: one step.
        optimizer: whose moments are held.

    Returns:
        The bytes by kind; under pipeline, of the rank with the most.

    Raises:
        ConfigError: a group of the optimizer names no parameter.
    """
    ranks = [
        _pipeline_rank_memory(model, parallel, work, optimizer, rank)
        for rank in range(parallel.pipeline)
    ]
    return max(ranks, key=lambda memory: memory.total)


def update_memory(
    model: ModelConfig, parallel: ParallelConfig, work: Work, optimizer: OptimizerConfig
) -> TrainingMemory:
    """Count what a rank holds at the highest point of an update; see rank_memory."""
    ranks = []
    for rank in range(parallel.pipeline):
        own = sum(unit.divided for unit in _units(model, parallel, rank)) * _FP32_BYTES
        share = optimizer_share(model, parallel, optimizer, rank)
        memory = TrainingMemory(
            weights=own,
            gradients=own,
            moments=share.moments * _FP32_BYTES,
            cast_weights=0,
            gathered=0,
            batch=_rank_tokens(parallel, work) * BATCH_TOKEN_BYTES,
            kept=_rings_bytes(parallel),
            working=0,
            update=share.update_bytes,
        )
        ranks.append(memory)
    return max(ranks, key=lambda memory: memory.total)


def _pipeline_rank_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    work: Work,
    optimizer: OptimizerConfig,
    rank: int,
) -> TrainingMemory:
    part, tokens = _rank_part(model, parallel, rank), _rank_tokens(parallel, work)
    share = optimizer_share(model, parallel, optimizer, rank)
    how = {
        "recompute_every": work.recompute_every,
        "stream_bytes": work.stream_bytes,
        "product_bytes": work.element_bytes,
        "keeps_attention": work.keeps_attention,
        "expert_ranks": parallel.expert if parallel.routes_tokens else None,
    }
    memory = training_memory(
        part,
        tokens,
        **how,
        context_ranks=parallel.context,
        held=_held_weights(model, parallel, rank, share.moments),
        accumulates=work.num_micro_batches > 1,
    )
    waiting = (_in_flight(parallel, work, rank) - 1) * tokens * kept_bytes(part, **how)
    # Blocks that are gathered in bf16 need no copies.
    cast = memory.cast_weights if parallel.gather_dtype is None else 0
    kept = memory.kept + round(waiting) + _rings_bytes(parallel)
    return replace(memory, kept=kept, cast_weights=cast)


def _rings_bytes(parallel: ParallelConfig) -> int:
    """Of what copies go through."""
    total = Copies.memory_bytes(parallel.expert) if parallel.expert_exchange == "copies" else 0
    if parallel.weight_exchange == "copies":
        total += Copies.memory_bytes(parallel.weight_shards)
        if parallel.routes_tokens and parallel.expert_shards > 1:
            total += Copies.memory_bytes(parallel.expert_shards)
    return total


def _rank_part(model: ModelConfig, parallel: ParallelConfig, rank: int) -> ModelConfig:
    """The layers of a pipeline rank, and of them what one tensor rank computes.

    Experts that divide their width otherwise meet as many more tokens as they are wider.
    """
    t, moe = parallel.tensor, model.moe
    if moe is not None and moe.shared_intermediate_size is not None:
        width = moe.shared_intermediate_size // t
        moe = moe.model_copy(update={"shared_intermediate_size": width})
    changes = {
        "layer_types": tuple(model.layer_types[n] for n in rank_layers(model, parallel, rank)),
        "num_attention_heads": model.num_attention_heads // t,
        "num_key_value_heads": model.num_key_value_heads // t,
        "intermediate_size": model.intermediate_size // t,
        "moe": moe,
    }
    return model.model_copy(update=changes)


def _held_weights(
    model: ModelConfig, parallel: ParallelConfig, rank: int, moments: int
) -> HeldWeights:
    outer, *blocks = _units(model, parallel, rank)
    whole, own = sum(unit.whole for unit in blocks), sum(unit.divided for unit in blocks)
    block = whole // len(blocks)
    # A block and the next one, or all; gradients of a block, and those that are on their way.
    gathered = (whole if parallel.gather_once else 2 * block) * _element_bytes(parallel)
    gathered += (outer.whole + 2 * block) * _FP32_BYTES
    if parallel.weight_exchange == "copies":
        gathered += block * _FP32_BYTES  # others' summands
    is_last = rank == parallel.pipeline - 1
    return HeldWeights(
        own=outer.divided + own,
        moments=moments,
        own_block=own // len(blocks),
        block=block,
        head=model.vocab_size * model.hidden_size // parallel.tensor if is_last else 0,
        gathered_bytes=gathered if parallel.token_ranks > 1 else 0,
    )


def _element_bytes(parallel: ParallelConfig) -> int:
    """Of an element of a block's weights, gathered."""
    return _FP32_BYTES if parallel.gather_dtype is None else _BF16_BYTES


def step_time(model: ModelConfig, parallel: ParallelConfig, work: Work, rates: Rates) -> StepTime:
    """Estimate a step's time from its FLOPs and what each group exchanges.

    Args:
        model: the model.
        parallel: degrees that suit it.
        work: one step.
        rates: what a rank reaches.

    Returns:
        The times; the exchange of a group that spans nodes runs at the far rate.
    """
    flops = training_flops(model, [work.seq_len]) * work.step_rows
    # A forward is a third of a step.
    again = work.recomputed_share(model.num_hidden_layers) / 3
    if work.keeps_attention:
        again *= 1 - _attention_share(model, work.seq_len)
    # Stages wait while the first micro-batches come, and the last leave: arXiv 2104.04473.
    idle = (parallel.pipeline - 1) / (parallel.pipeline_stages * work.num_micro_batches)
    compute = flops * (1 + again) * (1 + idle) / parallel.num_ranks / rates.flops_per_s
    sent = _exchanged_bytes(model, parallel, work)
    spans = {
        "weights": parallel.tensor * parallel.weight_shards,
        "copies": parallel.stage_ranks,
        "pipeline": parallel.num_ranks,
        "tensor": parallel.tensor,
        "context": parallel.tensor * parallel.context,
        "expert": parallel.expert_width * parallel.expert,
        "expert_tensor": parallel.expert_width,
    }
    speeds = {
        name: rates.near_bytes_per_s if span <= rates.node_ranks else rates.far_bytes_per_s
        for name, span in spans.items()
    }
    return StepTime(compute, {name: size / speeds[name] for name, size in sent.items() if size})


def _attention_share(model: ModelConfig, num_tokens: int) -> float:
    """What of a forward's FLOPs is softmax attention over all tokens, between its products."""
    layer = mixing_flops(model, "full_attention", num_tokens)
    return model.count("full_attention") * layer / prefill_flops(model, num_tokens)


def _units(model: ModelConfig, parallel: ParallelConfig, rank: int) -> Sequence[_Unit]:
    """Embedding, last norm and head; then each block: what one pipeline rank has of them."""
    layers = rank_layers(model, parallel, rank)
    found = {layer: _Unit(0, 0) for layer in (None, *layers)}
    for name, held in held_by_rank(model, parallel, rank).items():
        unit = found[layer_of(name)]
        found[layer_of(name)] = _Unit(unit.whole + held.whole, unit.divided + held.own)
    return list(found.values())


def _rank_tokens(parallel: ParallelConfig, work: Work) -> int:
    return work.micro_batch_rows * work.seq_len // parallel.token_ranks


def _in_flight(parallel: ParallelConfig, work: Work, rank: int) -> float:
    """Micro-batches whose activations a pipeline rank keeps at once."""
    P, V = parallel.pipeline, parallel.pipeline_stages
    most = P - rank if V == 1 else ((V - 1) * P + 2 * (P - rank - 1) + 1) / V
    return min(work.num_micro_batches, most)


def _exchanged_bytes(model: ModelConfig, parallel: ParallelConfig, work: Work) -> dict[str, float]:
    """Bytes that a rank sends in a step, by group."""
    passes = work.num_micro_batches
    # The rank that exchanges most weights stands for all: its layers are as many as any rank's.
    by_rank = [_units(model, parallel, rank) for rank in range(parallel.pipeline)]
    units = max(by_rank, key=lambda units: sum(unit.whole for unit in units))
    tokens, e = _rank_tokens(parallel, work) * passes, work.element_bytes
    D, layers = model.hidden_size, max(len(units) - 1 for units in by_rank)
    forwards = 1 + work.recomputed_share(model.num_hidden_layers)
    outer, *blocks = (unit.whole - unit.divided for unit in units)
    reduced = (outer + sum(blocks)) * _FP32_BYTES * passes
    gathered = (outer * _FP32_BYTES + sum(blocks) * _element_bytes(parallel)) * passes
    divided = sum(unit.divided for unit in units) * _FP32_BYTES * passes
    t, c, x = parallel.tensor, parallel.context, parallel.expert
    heads, share = model.num_attention_heads // t, layers / model.num_hidden_layers
    # Of a rank's two stretches; half of all that travels goes the other way.
    state = 2 * heads * model.head_dim**2 * _FP32_BYTES
    keys = 2 * model.num_key_value_heads // t * model.head_dim * e * tokens
    num_linear = model.count("linear_attention") * share
    states = num_linear * (c - 1) * state * (forwards + 1) * passes
    keys_sent = (layers - num_linear) * (c - 1) * keys * (forwards + 1)
    chosen = 0 if model.moe is None else model.moe.num_experts_per_tok
    routed = tokens / t if parallel.routes_tokens else tokens
    there_and_back = 2 * chosen * D * e * routed
    # Rows are gathered and summed over an expert's width, where tokens travel to it.
    width = parallel.expert_width if parallel.routes_tokens else 1
    # A sum sends twice what a gather does. Of a layer two are summed, or the mixer's is, and
    # results of the experts gathered, of which each tensor rank has those of its tokens.
    tensor_gathers = 3 if parallel.routes_tokens else 4
    stages = parallel.pipeline_stages if parallel.pipeline > 1 else 0
    return {
        # Gathered forward and, unless they stay, backward; and the gradients divided.
        "weights": (1.0 if parallel.gather_once else 2.0) * gathered + reduced,
        "copies": 2.0 * divided * (parallel.replicate - 1) / parallel.replicate,
        "pipeline": 2.0 * stages * tokens * D * _FP32_BYTES,
        "tensor": layers * tensor_gathers * (forwards + 1) * tokens * D * e * (t - 1) / t,
        "context": states + keys_sent,
        "expert": layers * (forwards + 1) * there_and_back * (x - 1) / x,
        "expert_tensor": layers * (forwards + 1) * there_and_back * (width - 1),
    }
