"""The bytes that training_memory predicts are those that a step's tensors take."""

import pytest
from memory_ledger import as_on_a_gpu, peak_of_step

from sevenfold.models import ModelConfig, preset
from sevenfold.models.training_memory import TrainingMemory, training_memory

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
