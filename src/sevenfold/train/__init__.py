"""Training: run files, the loop, checkpoints, metrics."""

from sevenfold.train.config import RunConfig, load_run_config
from sevenfold.train.metrics import StepRecord, read_metrics
from sevenfold.train.run import TrainResult, train

__all__ = [
    "RunConfig",
    "StepRecord",
    "TrainResult",
    "load_run_config",
    "read_metrics",
    "train",
]
