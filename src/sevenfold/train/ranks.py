"""The processes of a run: joining them, and what the first does for all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from sevenfold.config import SevenfoldError, TrainingError
from sevenfold.parallel import Layout, ParallelConfig, check_num_ranks
from sevenfold.train.config import RunSection


@contextmanager
def join_ranks(parallel: ParallelConfig, run: RunSection) -> Iterator[tuple[Layout, RunSection]]:
    """Join the processes that torchrun has started, one a rank; without it the run is alone.

    Tensors on the host go over gloo and those on GPUs over NCCL, so that counts of tokens never
    wait for a GPU. A default group that exists is used and stays.

    Yields:
        The layout, and the run with this rank's device.

    Raises:
        ConfigError: the degrees do not multiply to the number of processes.
    """
    device_type = torch.device(run.device).type
    started = dist.is_torchelastic_launched() and not dist.is_initialized()
    if not started and not dist.is_initialized():
        check_num_ranks(parallel, 1)
        yield Layout(parallel), run
        return
    if device_type == "cuda":
        index = dist.get_node_local_rank(0)  # pyright: ignore[reportPrivateImportUsage]
        run = run.model_copy(update={"device": f"cuda:{index}"})
        torch.cuda.set_device(run.device)
    if started:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    try:
        yield Layout.join(parallel, device_type), run
    finally:
        if started:
            dist.destroy_process_group()


def first_for_all(layout: Layout, action: Callable[[], object]) -> None:
    """Let the first rank act while the others wait; what it raises stops all.

    Raises:
        SevenfoldError, OSError: on the first rank, as action raises it.
        TrainingError: on the others.
    """
    error: SevenfoldError | OSError | None = None
    if layout.is_first:
        try:
            action()
        except (SevenfoldError, OSError) as caught:
            error = caught
    failed = layout.agree(error is not None)
    if error is not None:
        raise error
    if failed:
        raise TrainingError(
            "the first rank must be able to write what the run shares, got an error there: see its "
            "output"
        )
