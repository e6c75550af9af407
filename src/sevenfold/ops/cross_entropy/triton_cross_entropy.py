"""Cross-entropy by chunks of tokens; loss and gradient of a chunk's logits in one kernel, in place.

    loss = sum_t logsumexp(z_t) - z_t[y_t]    z_t = W h_t    dz_t = softmax(z_t) - onehot(y_t)

A chunk's fp32 logits are the only large buffer: its gradient, rounded to the hidden vectors' dtype,
takes their place. One program has a row: it reads it once for the sum and once more, from the
cache, for the gradient.
"""

# Triton's decorator hides how a kernel is launched.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.operator import operator
from sevenfold.ops.row_launch import next_power_of_2
from sevenfold.ops.triton_launched import launched

# fp32 logits of a chunk, 512 MB: products of 4,096 tokens with 32,000 words are as fast as larger.
_CHUNK_ELEMENTS = 2**27
# Chunks of whole tiles of the matrix product.
_CHUNK_MULTIPLE = 128
# So many threads that the rows in hand, two a multiprocessor, stay in the cache until they are read
# again: 79% of the copy rate on an H200; 58% with 8 warps and 4,096 columns.
_MAX_BLOCK, _WARPS = 16_384, 32


@launched
@triton.jit
def _loss_kernel(
    logits_ptr, dlogits_ptr, labels_ptr, loss_ptr, V, dlogits_stride, BLOCK: tl.constexpr
):
    """Loss of one row; its gradient too, where dlogits_ptr (the same memory) is given."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * V
    column = tl.arange(0, BLOCK)
    largest, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        z = tl.load(
            logits_ptr + start + column, start + column < V, float("-inf"),
            eviction_policy="evict_last",
        )  # fmt: skip
        larger = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), 0)
        largest = larger
    normaliser = largest + tl.log(total)
    counted = label >= 0
    # A label beyond the vocabulary makes the loss NaN.
    chosen = tl.load(logits_ptr + label, counted & (label < V), float("nan"))
    tl.store(loss_ptr + row, tl.where(counted, normaliser - chosen, 0.0))
    if dlogits_ptr is not None:
        dlogits_ptr += row * dlogits_stride
        for start in range(0, V, BLOCK):
            z = tl.load(
                logits_ptr + start + column, start + column < V, float("-inf"),
                eviction_policy="evict_first",
            )  # fmt: skip
            p = tl.exp(z - normaliser) - tl.where(start + column == label, 1.0, 0.0)
            # What is written lies where all threads have read: at or before this block's start.
            tl.debug_barrier()
            dlogits = tl.where(counted, p, 0.0)
            tl.store(dlogits_ptr + start + column, dlogits, start + column < V)


def chunk_tokens(vocab_size: int) -> int:
    """How many tokens' logits exist at once."""
    tokens = _CHUNK_ELEMENTS // vocab_size
    return max(1, tokens - tokens % _CHUNK_MULTIPLE if tokens > _CHUNK_MULTIPLE else tokens)


def _loss_of(logits: Tensor, labels: Tensor, loss: Tensor, dlogits: Tensor | None) -> None:
    T, V = logits.shape
    block = min(_MAX_BLOCK, next_power_of_2(V))
    stride = 0 if dlogits is None else dlogits.stride(0)
    _loss_kernel[(T,)](logits, dlogits, labels, loss, V, stride, BLOCK=block, num_warps=_WARPS)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    if hidden.device.type == "cuda" and hidden.dtype is not torch.float32:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.float().t()


def _add_product(dweight: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """dweight += dlogits^T hidden, accumulated in fp32."""
    if hidden.device.type == "cuda" and hidden.dtype is not torch.float32:
        torch.addmm(dweight, dlogits.t(), hidden, out_dtype=torch.float32, out=dweight)
    else:
        dweight.addmm_(dlogits.float().t(), hidden.float())


@operator("sevenfold::linear_cross_entropy")
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over tokens, and the gradients that are wanted (else empty), weight's in fp32."""
    loss, dhidden, dweight = _results(hidden, weight, labels, wants_hidden, wants_weight)
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    dweight.zero_()
    step, labels = chunk_tokens(len(weight)), labels.contiguous()
    for at in range(0, len(hidden), step):
        part = slice(at, at + step)
        logits = _logits(hidden[part], weight)
        dlogits = None
        if wants_hidden or wants_weight:
            dlogits = logits.view(hidden.dtype)[:, : len(weight)]
        _loss_of(logits, labels[part], losses[part], dlogits)
        if wants_hidden:
            torch.mm(dlogits, weight, out=dhidden[part])
        if wants_weight:
            _add_product(dweight, dlogits, hidden[part])
        # Or the next chunk's would be made beside them.
        del logits, dlogits
    return losses.sum().view_as(loss), dhidden, dweight


@linear_cross_entropy.register_fake
def _results(
    hidden: Tensor, weight: Tensor, labels: Tensor, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    dhidden = hidden.new_empty(hidden.shape if wants_hidden else (0,))
    shape = weight.shape if wants_weight else (0,)
    return loss, dhidden, torch.empty(shape, dtype=torch.float32, device=hidden.device)


@operator("sevenfold::scaled")
def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x times a scalar, rounded to dtype in the same pass."""
    return torch.mul(x, factor, out=torch.empty(x.shape, dtype=dtype, device=x.device))


scaled.register_fake(lambda x, factor, dtype: torch.empty(x.shape, dtype=dtype, device=x.device))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtype, ctx.wants = inputs[1].dtype, inputs[3:]


def _grads(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None, None]
    for i, (grad, wanted) in enumerate(zip(ctx.saved_tensors, ctx.wants, strict=True)):
        if wanted and dloss is not None:
            grads[i] = scaled(grad, dloss, ctx.dtype)
    return *grads, None, None, None


linear_cross_entropy.register_autograd(_grads, setup_context=_save)


def forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum over counted tokens; arguments as in the public operator, flattened."""
    with_grad = torch.is_grad_enabled()
    wants = (with_grad and hidden.requires_grad, with_grad and weight.requires_grad)
    return linear_cross_entropy(hidden.contiguous(), weight.contiguous(), labels, *wants)[0]
