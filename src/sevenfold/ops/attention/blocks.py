"""Softmax attention over some of a query's keys, with the log-sum-exp that joins several.

    o = sum over blocks b of exp(lse_b - lse) o_b        lse = log sum over b of exp(lse_b)

Ring attention takes each query's keys block by block. Source: arXiv 2310.01889 (ring attention),
2205.14135 (FlashAttention), whose backward needs o and lse of all keys and one block at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.attention import blocks_cudnn, blocks_eager, blocks_flash
from sevenfold.ops.attention.block import Block
from sevenfold.ops.attention.join import Part
from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.types import Impl

_MODULES = {Impl.EAGER: blocks_eager, Impl.FLASH: blocks_flash, Impl.CUDNN: blocks_cudnn}


def default_block_impl(q: Tensor, v: Tensor, block: Block) -> Impl:
    """Return what attention_block takes.

    For bf16 and fp16 on a GPU cudnn, where all sequences are alike and of one of few lengths (see
    blocks_cudnn), on compute capability 9.0; else flash. Elsewhere eager.
    """
    if not q.is_cuda or q.dtype not in blocks_flash.DTYPES:
        return Impl.EAGER
    return Impl.CUDNN if blocks_cudnn.refusal(q, v, block) is None else Impl.FLASH


def attention_block(
    q: Tensor, k: Tensor, v: Tensor, block: Block, *, impl: Impl | str | None = None
) -> tuple[Tensor, Tensor]:
    """Attend packed queries to packed keys, sequence by sequence; it takes no gradient.

        o_i = sum_j softmax_j(scale * q_i^T k_j) v_j        lse_i = log sum_j exp(scale * q_i^T k_j)

    Args:
        q: [T, H, D]; sequences end to end.
        k: [S, G, D], dtype of q; G divides H: query head h reads key head h * G // H.
        v: [S, G, D], dtype of q.
        block: the sequences; over all of a sequence's keys, or over j <= i.
        impl: "eager", "flash" (PyTorch's FlashAttention: bf16 or fp16 on a GPU) or "cudnn" (equal
            sequences there); None takes default_block_impl. A named one never falls back.

    Returns:
        o [T, H, D] in v's dtype, and lse [H, T] in fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: a shape, dtype or length breaks the rules above.
        UnsupportedError: the operator has no implementation of that name, or not for these.
    """
    module = _module(q, k, v, block, impl)
    with torch.no_grad():
        return module.forward(q, k, v, block)


def attention_block_backward(
    do: Tensor,
    tokens: Sequence[Tensor],
    o: Tensor,
    lse: Tensor,
    block: Block,
    *,
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one block adds to the gradients of q, and the gradients of its k and v.

        p_ij = exp(scale * q_i^T k_j - lse_i)      dv_j = sum_i p_ij do_i
        ds_ij = p_ij (do_i^T v_j - do_i^T o_i)     dq_i = scale sum_j ds_ij k_j, dk_j likewise

    Args:
        do: [T, H, D], gradient of o.
        tokens: q, k and v, as in attention_block.
        o: [T, H, D], of all of the queries' keys, not this block's alone.
        lse: [H, T], likewise.
        block, impl: as in attention_block.

    Returns:
        dq [T, H, D], dk and dv [S, G, D], in the inputs' dtype.

    Raises:
        ValueError, TypeError, UnsupportedError: as attention_block.
    """
    q, k, v = tokens
    check_shape("do", do, o.shape, "[T, H, D]")
    check_shape("lse", lse, (q.shape[1], q.shape[0]), "[H, T]")
    module = _module(q, k, v, block, impl)
    with torch.no_grad():
        return module.backward(do, (q, k, v), o, lse, block)


def join_blocks(o: Tensor, lse: Tensor, more_o: Tensor, more_lse: Tensor) -> None:
    """Join another block into o and lse, in place.

    Args:
        o, more_o: [T, H, D]; o in lse's dtype.
        lse, more_lse: [H, T], finite.
    """
    if o.is_cuda and o.dtype is torch.float32:
        # Triton takes a while to import: only who needs it waits for it.
        from sevenfold.ops.attention.triton_join import join

        join(Part(o, lse), Part(more_o, more_lse), o)
        return
    joint = torch.logaddexp(lse, more_lse)
    o.mul_(torch.exp(lse - joint).t()[..., None])
    o.addcmul_(more_o.to(o.dtype), torch.exp(more_lse - joint).t()[..., None])
    lse.copy_(joint)


def _module(q: Tensor, k: Tensor, v: Tensor, block: Block, impl: Impl | str | None):
    check_shape("k", k, (len(k), k.shape[1], q.shape[2]), "[S, G, D]")
    check_shape("v", v, k.shape, "[S, G, D]")
    for name, x in (("k", k), ("v", v)):
        check_dtype(name, x, (q.dtype,))
        check_device(name, x, q.device)
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k's heads must divide the {q.shape[1]} query heads, got {k.shape[1]}")
    lengths, key_lengths = block.lengths, block.key_lengths
    for name, values, total in (("lengths", lengths, len(q)), ("key_lengths", key_lengths, len(k))):
        if min(values, default=0) < 1 or sum(values) != total:
            raise ValueError(f"{name} must be >= 1 and sum to {total}, got {list(values)}")
    if len(lengths) != len(key_lengths) or (block.causal and list(lengths) != list(key_lengths)):
        rule = "lengths" if block.causal else f"{len(lengths)} numbers"
        raise ValueError(f"key_lengths must be {rule}, got {list(key_lengths)}")
    default = default_block_impl(q, v, block)
    chosen = choose_impl("attention_block", impl, default, tuple(_MODULES))
    if chosen is Impl.FLASH and default is Impl.EAGER:
        raise UnsupportedError(
            f"q must be bf16 or fp16 on a GPU for impl flash, got {q.dtype} on {q.device}"
        )
    if chosen is Impl.CUDNN and (refusal := blocks_cudnn.refusal(q, v, block)):
        raise UnsupportedError(refusal)
    return _MODULES[chosen]
