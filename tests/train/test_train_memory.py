"""The bytes that training_memory predicts are those that a step's tensors take."""

import pytest
from memory_ledger import as_on_a_gpu, peak_of_step, peak_of_update

from sevenfold.models import ModelConfig, preset
from sevenfold.models.training_memory import TrainingMemory, training_memory
from sevenfold.optim import OptimizerConfig
from sevenfold.parallel import ParallelConfig
from sevenfold.parallel.holding import optimizer_share

_OURS = 0.01  # of the tensors that the ledger sees


def ladder(form: str, num_layers: int) -> ModelConfig:
    """The 1B model of the ladder with fewer layers, of which the last is softmax, unless told."""
    config = preset(f"1b-{form}")
    return config.model_copy(
        update={"layer_types": config.layer_types[-num_layers:], "max_position_embeddings": 2**20}
    )


def seen(predicted: TrainingMemory, whole_weights: int) -> int:
    """What of a prediction the ledger sees: no moments, weights whole, no workspace."""
    hidden = predicted.moments + predicted.workspace + predicted.gathered + predicted.weights
    return predicted.total - hidden + whole_weights


@pytest.mark.parametrize(
    ("form", "rows", "tokens", "recompute_every", "ranks"),
    [
        ("hybrid", 2, 8192, None, 1),
        ("hybrid", 2, 65_536, 1, 1),
        ("softmax", 2, 65_536, 1, 1),
        ("lightning", 1, 262_144, 1, 2),
        ("hybrid", 1, 524_288, 1, 2),
    ],
)
def test_a_prediction_is_what_tensors_take(
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    rows: int,
    tokens: int,
    recompute_every: int | None,
    ranks: int,
) -> None:
    as_on_a_gpu(monkeypatch)
    config = ladder(form, 4)
    found = peak_of_step(config, rows, tokens, recompute_every=recompute_every, ranks=ranks)
    how = {"recompute_every": recompute_every, "context_ranks": ranks}
    whole = training_memory(config, 1).weights
    predicted = seen(training_memory(config, rows * tokens, **how), whole)
    assert abs(predicted / found - 1) <= _OURS, f"{predicted} predicted, {found} found"


MUON = OptimizerConfig(lr=0.1, kind="muon")
MIXTURE = preset("bench-2b").model_copy(
    update={"layer_types": ("linear_attention", "full_attention")}
)
# Stacked matrices of 1,024 by 8,192, of which the iteration needs little, and the result more.
FLAT = MIXTURE.model_copy(update={"hidden_size": 1024, "intermediate_size": 4096})


@pytest.mark.parametrize(
    ("config", "degrees", "device"),
    [
        (ladder("hybrid", 4), {}, "cuda"),
        (MIXTURE, {}, "cuda"),
        (FLAT, {}, "cuda"),
        (ladder("hybrid", 4), {"shard": 4}, "cpu"),
        (MIXTURE, {"shard": 2, "replicate": 2}, "cpu"),
        (MIXTURE, {"shard": 4, "expert": 2}, "cpu"),
        (MIXTURE, {"shard": 2, "expert": 2}, "cpu"),
        (MIXTURE, {"tensor": 2}, "cpu"),
        (MIXTURE, {"tensor": 2, "shard": 2, "expert_tensor": 4}, "cpu"),
    ],
)
def test_an_updates_prediction_is_what_tensors_take(
    config: ModelConfig, degrees: dict[str, int], device: str
) -> None:
    parallel = ParallelConfig(**degrees)
    moments, peak = peak_of_update(config, parallel, MUON, device=device)
    predicted = optimizer_share(config, parallel, MUON, 0)
    assert predicted.moments == moments
    assert abs(predicted.update_bytes / peak - 1) <= _OURS, f"{predicted} predicted, {peak} found"
