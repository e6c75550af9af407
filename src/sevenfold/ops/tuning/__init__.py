"""How kernels are launched on each device: committed measurements, never measured at run time."""

from sevenfold.ops.tuning.tuning import best_config

__all__ = ["best_config"]
