"""Layouts that are compared with one process.

Errors that other trainers had without a word, and the case that would show each: copies of norms
and routers that tensor ranks do not sum (tensor*, by the ranks' copies); a norm that undercounts
experts or counts copies twice (tensor-expert, experts-*, replicate-expert); a norm of each expert
group's own (expert*); gradients of experts times the group's size, or none (expert*); experts
overwritten by the first rank's (expert*, by their weights after the step); a document that leaks
over a border, or whose positions begin anew (context*, ring*); a mean over ranks of means over
labels (shard, context: labels are uneven); balance counted again by recomputation, or of local
tokens alone (*recompute, expert-4); routers' losses that stages before the last lose, or that count
once a micro-batch too often (pipeline*); drops in another order than the tokens' (expert-context,
experts-apart: their ranks hold stretches from both ends of a row); padding that routers count, or
that takes experts' capacity (padded*; of a row of 3 tokens a context rank has padding alone); names
that change when a run is read under another layout (test_parallel_runs).
"""

from parallel_helpers import MOE, Case

DENSE = {"tie_word_embeddings": True}
DENSE_APART = {"tie_word_embeddings": False}
MIXTURE = {"moe": MOE}
MOE_NO_DROP = {"moe": MOE | {"capacity_factor": None}}
STREAM = {"autocast": "bf16", "stream": "bf16"}
NORM_GROUPS = {"linear_attn_norm_groups": 2}
RING = {"context": 2, "context_attention": "ring"}
PADDED = {"model": MIXTURE, "is_padded": True}
BY_COPIES = {"expert_exchange": "copies", "weight_exchange": "copies"}
INTERLEAVED = {"pipeline": 2, "pipeline_stages": 2}

CASES = (
    Case("shard", {"shard": 2}, model=MOE_NO_DROP),
    Case("tied-shard", {"shard": 2}, model=DENSE, recompute=True),
    Case("gather-once", {"shard": 2, "gather_once": True}, model=DENSE, recompute=True),
    Case(
        "gather-bf16",
        {"shard": 2, "gather_dtype": "bf16"},
        model=MOE_NO_DROP,
        recompute=True,
        autocast="bf16",
    ),
    Case(
        "gather-once-bf16",
        {"shard": 2, "gather_once": True, "gather_dtype": "bf16"},
        model=MOE_NO_DROP,
        num_micro_batches=2,
        autocast="bf16",
    ),
    Case("replicate", {"replicate": 2}, model=DENSE, is_slow=True),
    Case("once-replicate", {"replicate": 2, "gather_once": True}, model=NORM_GROUPS),
    Case("norm-groups-shard", {"shard": 2}, model=NORM_GROUPS),
    Case("context", {"context": 2}, micro_batch_rows=3, model=DENSE),
    Case("context-recompute", {"context": 2}, micro_batch_rows=1, recompute=True, is_slow=True),
    Case(
        "context-ring",
        {"context": 2, "context_attention": "ring"},
        micro_batch_rows=3,
        model={"num_key_value_heads": 2},
        recompute=True,
    ),
    Case("ring-expert", RING | {"expert": 2}, micro_batch_rows=3, model=MIXTURE),
    Case("pipeline", {"pipeline": 2}, num_micro_batches=3, model=MIXTURE, recompute=True),
    Case(
        "pipeline-interleaved",
        {"pipeline": 2, "pipeline_stages": 2},
        micro_batch_rows=2,
        num_micro_batches=4,
        is_slow=True,
    ),
    Case("context-bf16", {"context": 2}, micro_batch_rows=3, autocast="bf16"),
    Case("tensor-bf16", {"tensor": 2}, autocast="bf16"),
    Case("shard-stream", {"shard": 2}, model=DENSE, recompute=True, is_slow=True, **STREAM),
    Case("context-stream", {"context": 2}, micro_batch_rows=3, **STREAM),
    Case("tensor-stream", {"tensor": 2}, is_slow=True, **STREAM),
    Case("pipeline-stream", {"pipeline": 2}, num_micro_batches=3, model=MOE_NO_DROP, **STREAM),
    Case(
        "expert",
        {"shard": 2, "expert": 2, "expert_token_groups": 2},
        model=MIXTURE,
        is_slow=True,
    ),
    Case(
        "expert-context",
        {"context": 2, "expert": 2, "gather_once": True},
        micro_batch_rows=3,
        model=MIXTURE,
    ),
    Case("copies", BY_COPIES | {"shard": 2, "expert": 2}, model=MIXTURE),
    Case(
        "copies-context",
        {"context": 2, "weight_exchange": "copies", "gather_dtype": "bf16"},
        model=MOE_NO_DROP,
        autocast="bf16",
        is_slow=True,
    ),
    Case("tensor", {"tensor": 2}, model=MIXTURE),
    Case("tensor-groups", {"tensor": 2}, model=NORM_GROUPS),
    Case("tensor-tied", {"tensor": 2}, model=DENSE, recompute=True, is_slow=True),
    Case("padded-expert", {"shard": 2, "expert": 2, "expert_token_groups": 2}, **PADDED),
    Case(
        "padded-context",
        {"context": 2},
        micro_batch_rows=1,
        num_micro_batches=3,
        model=MOE_NO_DROP,
        recompute=True,
        is_padded=True,
    ),
    Case(
        "padded-expert-context",
        {"context": 2, "expert": 2},
        micro_batch_rows=1,
        num_micro_batches=3,
        recompute=True,
        **PADDED,
    ),
    Case("padded-pipeline", {"pipeline": 2}, num_micro_batches=3, is_slow=True, **PADDED),
    Case("padded-tensor", {"tensor": 2}, is_slow=True, **PADDED),
    Case("hybrid-shard", {"replicate": 2, "shard": 2}, model=DENSE),
    Case("context-4", {"context": 4}, micro_batch_rows=2, model=DENSE),
    Case("shard-context", {"shard": 2, "context": 2}, micro_batch_rows=2, model=DENSE),
    Case("expert-4", {"shard": 4, "expert": 4}, model=MIXTURE, recompute=True),
    Case("expert-2-of-4", {"shard": 4, "expert": 2}, model=MOE_NO_DROP),
    Case(
        "replicate-expert",
        {"replicate": 2, "shard": 2, "expert": 2},
        model=MOE_NO_DROP,
    ),
    Case("copies-4", BY_COPIES | {"shard": 4, "expert": 2}, model=MOE_NO_DROP, recompute=True),
    Case(
        "copies-replicate-expert",
        BY_COPIES | {"replicate": 2, "shard": 2, "expert": 2},
        model=MOE_NO_DROP,
    ),
    Case(
        "copies-replicate",
        {"replicate": 2, "shard": 2, "weight_exchange": "copies"},
        num_micro_batches=2,
        model=DENSE,
    ),
    Case("tensor-4", {"tensor": 4}, model=MIXTURE),
    Case(
        "ring-4",
        {"context": 4, "context_attention": "ring"},
        micro_batch_rows=2,
        model={"num_key_value_heads": 1},
    ),
    Case("pipeline-shard", {"pipeline": 2, "shard": 2}, num_micro_batches=3),
    Case(
        "pipeline-4",
        {"pipeline": 4},
        micro_batch_rows=1,
        num_micro_batches=6,
        model=MIXTURE,
    ),
    Case("pipeline-tensor", {"pipeline": 2, "tensor": 2}, model=MIXTURE),
    Case("pipeline-context", {"pipeline": 2, "context": 2}, model=DENSE_APART),
    Case("pipeline-expert", {"pipeline": 2, "shard": 2, "expert": 2}, model=MIXTURE),
    Case("pipeline-replicate", {"pipeline": 2, "replicate": 2}, model=NORM_GROUPS),
    Case("replicate-context", {"replicate": 2, "context": 2}, model=MOE_NO_DROP),
    Case("replicate-tensor", {"replicate": 2, "tensor": 2}, model=MOE_NO_DROP),
    Case("expert-bf16", {"shard": 4, "expert": 4}, model=MOE_NO_DROP, autocast="bf16"),
    Case(
        "ring-bf16",
        {"context": 4, "context_attention": "ring"},
        model=DENSE_APART,
        autocast="bf16",
    ),
    Case("experts-whole", {"tensor": 2, "shard": 2, "expert_tensor": 1}, model=MOE_NO_DROP),
    Case("experts-wide", {"shard": 4, "expert": 2, "expert_tensor": 2}, model=MIXTURE),
    Case(
        "experts-apart",
        {"tensor": 2, "context": 2, "expert": 4, "expert_tensor": 1},
        micro_batch_rows=4,
        model=MIXTURE,
    ),
    Case(
        "padded-apart",
        {"tensor": 2, "context": 2, "expert": 4, "expert_tensor": 1, "expert_token_groups": 2},
        micro_batch_rows=1,
        num_micro_batches=3,
        **PADDED,
    ),
    Case("padded-tensor-expert", {"tensor": 2, "shard": 2, "expert": 2}, **PADDED),
    Case("padded-wide", {"shard": 4, "expert": 2, "expert_tensor": 2}, **PADDED),
    Case(
        "experts-turned",
        {"tensor": 2, "shard": 2, "expert_tensor": 4},
        model=MOE_NO_DROP,
    ),
    Case(
        "experts-groups",
        {"context": 4, "expert": 4, "expert_token_groups": 3},
        micro_batch_rows=4,
        model=MIXTURE,
        recompute=True,
    ),
    Case("tensor-shard", {"tensor": 2, "shard": 2}, model=DENSE),
    Case("tensor-expert", {"tensor": 2, "shard": 2, "expert": 2}, model=MIXTURE, recompute=True),
    Case("tensor-context", {"tensor": 2, "context": 2}, micro_batch_rows=3, model=DENSE),
    Case("ring-shard", RING | {"shard": 2}, micro_batch_rows=2, model=DENSE, recompute=True),
    Case("ring-tensor", RING | {"tensor": 2}, micro_batch_rows=3, model=DENSE),
    Case("ring-pipeline", RING | {"pipeline": 2}, model=DENSE_APART),
    Case("ring-replicate", RING | {"replicate": 2}, model=DENSE),
    Case("interleaved-shard", INTERLEAVED | {"shard": 2}, num_micro_batches=4, model=MOE_NO_DROP),
    Case("interleaved-tensor", INTERLEAVED | {"tensor": 2}, num_micro_batches=4, model=MIXTURE),
    Case("interleaved-replicate", INTERLEAVED | {"replicate": 2}, num_micro_batches=4),
    Case(
        "interleaved-expert",
        INTERLEAVED | {"shard": 2, "expert": 2},
        num_micro_batches=2,
        model=MIXTURE,
    ),
    Case(
        "interleaved-context",
        INTERLEAVED | {"context": 2},
        num_micro_batches=4,
        model=DENSE_APART,
        recompute=True,
    ),
    Case("once-pipeline", {"pipeline": 2, "shard": 2, "gather_once": True}, num_micro_batches=3),
    Case("once-tensor", {"tensor": 2, "shard": 2, "gather_once": True}, model=DENSE),
    Case("tensor-groups-shard", {"tensor": 2, "shard": 2}, model=NORM_GROUPS),
    Case("replicate-wide", {"replicate": 2, "shard": 2, "expert_tensor": 2}, model=MOE_NO_DROP),
    Case(
        "all",
        {
            "pipeline": 2,
            "context": 2,
            "tensor": 2,
            "expert": 2,
            "expert_tensor": 1,
            "expert_token_groups": 2,
        },
        num_micro_batches=3,
        model=MOE_NO_DROP,
        recompute=True,
    ),
)
