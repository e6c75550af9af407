"""Stands in for copies between GPUs, so that layouts which go by copies are tested on CPUs."""

import ctypes

import torch
from torch import Tensor
from torch import distributed as dist

from sevenfold.parallel.copies import Copies, Piece

MOVED: list[Copies] = []  # what has moved something in this process


class _Come:
    def wait(self) -> None:
        pass


def move(
    self: Copies, tensors: tuple[Tensor, ...], leaving: list[Piece], coming: list[Piece]
) -> _Come:
    """Copies.move over gloo, from and to the same addresses."""
    group, works = self._group, []
    MOVED.append(self)
    for kind, pieces in ((dist.isend, leaving), (dist.irecv, coming)):
        for rank, piece in enumerate(pieces):
            if piece.num_bytes and rank != dist.get_rank(group):
                peer = dist.get_global_rank(group, rank)
                works.append(kind(memory(piece), peer, group=group))
    for work in works:
        work.wait()
    return _Come()


def memory(piece: Piece) -> Tensor:
    at = (ctypes.c_uint8 * piece.num_bytes).from_address(piece.address)
    return torch.frombuffer(at, dtype=torch.uint8)


def stand_in() -> None:
    """Let copies go over gloo in this process."""
    Copies.move = move
