"""What fully_shard calls to gather weights and to sum gradients, by copies between GPUs of a host.

    gather      every rank's part to every rank
    reduce      every rank's summand to the rank that it is for, which adds them up

The sum of a reduction is a kernel of its own, behind the copies.
"""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

from sevenfold.parallel.copies import NOTHING, Copies, Piece, end_to_end


def exchange_by_copies(unit: FSDPModule, copies: Copies) -> None:
    """Let a unit of fully_shard gather and reduce by copies.

    Args:
        unit: divided already.
        copies: of the ranks that it is divided among.
    """
    unit.set_custom_all_gather(_Gather(copies))  # pyright: ignore[reportArgumentType]
    unit.set_custom_reduce_scatter(_ReduceScatter(copies))  # pyright: ignore[reportArgumentType]


class _Comm:
    """What both are for fully_shard, which waits by its streams."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies

    def allocate(
        self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def _move(self, source: list[Piece], target: list[Piece], *tensors: Tensor) -> None:
        self._copies.move(tensors, source, target).wait()


class _Gather(_Comm):
    """Into output, of which input is this rank's part already: fully_shard has copied it there."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        own = output_tensor.chunk(group.size())[group.rank()]
        assert own.data_ptr() == input_tensor.data_ptr(), "a rank's part must lie in its place"
        source = [Piece(input_tensor.data_ptr(), input_tensor.nbytes)] * group.size()
        target = end_to_end(output_tensor.data_ptr(), [input_tensor.nbytes] * group.size())
        self._move(source, target, input_tensor, output_tensor)


class _ReduceScatter(_Comm):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        if op != dist.ReduceOp.SUM:
            raise ValueError(f"op must be a sum, got {op}")
        size, others = group.size(), group.size() - 1
        source = end_to_end(input_tensor.data_ptr(), [output_tensor.nbytes] * size)
        come = output_tensor.new_empty(others, *output_tensor.shape)
        target = end_to_end(come.data_ptr(), [output_tensor.nbytes] * others)
        target.insert(group.rank(), NOTHING)
        self._move(source, target, input_tensor, come)
        own = input_tensor.chunk(size)[group.rank()]
        torch.add(own, come[0], out=output_tensor)
        for other in come[1:]:
            output_tensor += other
