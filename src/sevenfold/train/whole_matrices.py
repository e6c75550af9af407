"""Matrices that fully_shard divides, whole for a moment: what Muon needs of them."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from sevenfold.optim import Parts


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _own(x: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return x
    # Every rank has computed the same, so nothing is sent.
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


GATHERED = Parts(_whole, _own)
