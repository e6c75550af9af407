"""The process-wide settings that a run needs, put back when it ends."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sevenfold.config import UnsupportedError
from sevenfold.train.config import RunSection


@contextmanager
def run_setting(run: RunSection) -> Iterator[torch.device]:
    """Set threads, determinism and seed for a run, and restore what was set before.

    Yields:
        The run's device.

    Raises:
        UnsupportedError: the device is not there.
    """
    device = _device(run.device)
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            torch.manual_seed(run.seed)
            torch.set_num_threads(run.num_threads or threads)
            torch.use_deterministic_algorithms(run.deterministic or deterministic)
            yield device
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(
            f"run.device must be present, got {name!r} with {torch.cuda.device_count()} CUDA "
            f"devices; --set run.device=cpu runs without"
        )
    return device
