"""Layouts that are compared with one process."""

from parallel_helpers import MOE, Case

DENSE = {"tie_word_embeddings": True}
MIXTURE = {"moe": MOE}

CASES = (
    Case("shard", {"shard": 2}, model=MIXTURE | {"moe": MOE | {"capacity_factor": None}}),
    Case("tied-shard", {"shard": 2}, model=DENSE, recompute=True),
    Case("replicate", {"replicate": 2}, model=DENSE),
    Case("context", {"context": 2}, micro_batch_rows=3, model=DENSE),
    Case("context-recompute", {"context": 2}, micro_batch_rows=1, recompute=True),
    Case("expert", {"shard": 2, "expert": 2}, model=MIXTURE),
    Case("expert-context", {"context": 2, "expert": 2}, micro_batch_rows=3, model=MIXTURE),
    Case("tensor", {"tensor": 2}, model=MIXTURE),
    Case("tensor-tied", {"tensor": 2}, model=DENSE, recompute=True),
    Case("hybrid-shard", {"replicate": 2, "shard": 2}, model=DENSE),
    Case("context-4", {"context": 4}, micro_batch_rows=2, model=DENSE),
    Case("shard-context", {"shard": 2, "context": 2}, micro_batch_rows=2, model=DENSE),
    Case("expert-4", {"shard": 4, "expert": 4}, model=MIXTURE, recompute=True),
    Case(
        "expert-2-of-4", {"shard": 4, "expert": 2}, model={"moe": MOE | {"capacity_factor": None}}
    ),
    Case(
        "replicate-expert",
        {"replicate": 2, "shard": 2, "expert": 2},
        model={"moe": MOE | {"capacity_factor": None}},
    ),
    Case("tensor-4", {"tensor": 4}, model=MIXTURE),
    Case("tensor-shard", {"tensor": 2, "shard": 2}, model=DENSE),
    Case("tensor-expert", {"tensor": 2, "shard": 2, "expert": 2}, model=MIXTURE, recompute=True),
    Case("tensor-context", {"tensor": 2, "context": 2}, micro_batch_rows=3, model=DENSE),
)
