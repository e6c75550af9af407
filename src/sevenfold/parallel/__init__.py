"""Parallelism over processes: layouts of ranks, applied to a plain model from outside."""

from sevenfold.parallel.apply import divide_model, shard_weights
from sevenfold.parallel.building import build_model
from sevenfold.parallel.config import ParallelConfig
from sevenfold.parallel.context.batch import ContextBatch, divide_row
from sevenfold.parallel.divided_loading import DividedModel, load_divided_model
from sevenfold.parallel.gradients import clip_gradients, gradient_norm, groups_by_mesh
from sevenfold.parallel.layout import Layout, Place, check_num_ranks
from sevenfold.parallel.pipeline import Pipeline, Stage, with_loss
from sevenfold.parallel.portable import portable, portable_tensors
from sevenfold.parallel.sharding import release_weights

__all__ = [
    "ContextBatch",
    "DividedModel",
    "Layout",
    "ParallelConfig",
    "Pipeline",
    "Place",
    "Stage",
    "build_model",
    "check_num_ranks",
    "clip_gradients",
    "divide_model",
    "divide_row",
    "gradient_norm",
    "groups_by_mesh",
    "load_divided_model",
    "portable",
    "portable_tensors",
    "release_weights",
    "shard_weights",
    "with_loss",
]
