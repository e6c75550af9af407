"""Cross-entropy by chunks of tokens: the gradient is taken while the chunk's logits exist.

    loss = sum_t logsumexp(z_t) - z_t[y_t]    z_t = W h_t    dz_t = softmax(z_t) - onehot(y_t)

The forward computes dh and dW at once (three products a chunk instead of the four of recomputation)
and the backward scales them.
"""

import torch
from torch import Tensor

from sevenfold.ops.cross_entropy.one_pass import Gradients, Wanted, loss_with_gradients
from sevenfold.ops.linear import head_logits, linear, weight_product

# fp32 logits of a chunk: 8 MB stay in a processor's cache, 1 GB fills a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**28}


def forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum over counted tokens; arguments as in the public operator, flattened."""
    return loss_with_gradients(_by_chunks, hidden, weight, labels)


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """How many tokens' logits exist at once."""
    return max(1, _CHUNK_ELEMENTS[device.type] // vocab_size)


def _by_chunks(hidden: Tensor, weight: Tensor, labels: Tensor, wanted: Wanted) -> Gradients:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    dhidden = torch.zeros_like(hidden) if wanted.hidden else None
    dweight = None
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    step = chunk_tokens(len(weight), hidden.device)
    for at in range(0, len(hidden), step):
        part = slice(at, at + step)
        if not any(wanted):
            loss += _loss(hidden[part], weight, labels[part])
            continue
        dlogits, more = _gradient(hidden[part], weight, labels[part])
        loss += more
        if dhidden is not None:
            dhidden[part] = linear(dlogits, weight.t())
        if wanted.weight:
            product = weight_product(dlogits, hidden[part])
            dweight = product if dweight is None else dweight.add_(product)
    if wanted.weight and dweight is None:
        dweight = torch.zeros_like(weight, dtype=dtype)
    return Gradients(loss, dhidden, dweight)


def _loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss of one chunk."""
    logits = head_logits(hidden, weight)
    wanted = logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(labels >= 0, torch.logsumexp(logits, dim=-1) - wanted, 0).sum()


def _gradient(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of one chunk's logits, in the dtype of hidden, and its loss."""
    logits = head_logits(hidden, weight)
    counted, target = labels >= 0, labels.clamp(min=0)[:, None]
    total = torch.logsumexp(logits, dim=-1)
    loss = torch.where(counted, total - logits.gather(1, target).squeeze(1), 0).sum()
    dlogits = logits.sub_(total[:, None]).exp_()
    dlogits.scatter_add_(1, target, dlogits.new_full(target.shape, -1))
    dlogits *= counted[:, None]
    return dlogits.to(hidden.dtype), loss
