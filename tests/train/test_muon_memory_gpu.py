"""What an update by Muon takes on a GPU, beside the prediction of a dry run."""

import pytest
import torch

from sevenfold.models import HybridModel, ModelConfig, init_weights, preset
from sevenfold.optim import OptimizerConfig, build_optimizer
from sevenfold.parallel import ParallelConfig
from sevenfold.parallel.holding import optimizer_share

pytestmark = pytest.mark.gpu
MUON = OptimizerConfig(lr=0.1, kind="muon")
MIXTURE = preset("bench-2b").model_copy(
    update={"layer_types": ("linear_attention", "full_attention")}
)
DENSE = preset("1b-hybrid")
# Of what is predicted: small buffers of the update that are not matrices.
_OURS = 0.02


@pytest.mark.parametrize("config", [MIXTURE, DENSE], ids=["mixture", "dense"])
def test_an_update_takes_what_is_predicted(config: ModelConfig) -> None:
    with torch.device("cuda"):
        model = init_weights(HybridModel(config), seed=0, drawn_on=torch.device("cuda"))
    optimizer = build_optimizer(model.named_parameters(), MUON)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()  # AdamW's moments, and what products keep for themselves
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    predicted = optimizer_share(config, ParallelConfig(), MUON, 0).update_bytes
    assert abs(predicted / found - 1) <= _OURS, f"{predicted} predicted, {found} found"
