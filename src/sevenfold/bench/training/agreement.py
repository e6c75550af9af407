"""Both sides checked before anything is timed."""

import torch
from torch import Tensor

from sevenfold.bench.peer import peer_logits
from sevenfold.models import HybridModel
from sevenfold.ops import linear_cross_entropy
from sevenfold.train.step import autocast_context, gradient_norm

_TOKENS = 256
# Units of rounding in the dtype of the products.
_UNITS = 16
# The peer's decay has 1e-5 in one more place than the original's (docs/checkpoints.md), and through
# all layers a gradient collects 1e-4 of roundings in fp32. Another model is off by far more.
_LEAST = 1e-3


def exact_values(model: HybridModel) -> tuple[float, float]:
    """Loss of a short row and its gradient's norm, in fp64 on a CPU and in fp32 on a GPU."""
    if model.device.type == "cuda":
        return _values(model, None)
    exact = HybridModel(model.config).to(model.device)
    exact.load_state_dict(model.state_dict())
    exact.double()
    return _values(exact, None)


def check_ours(
    model: HybridModel, exact: tuple[float, float], autocast: str | None
) -> dict[str, float]:
    """Compare our loss and gradient norm, as they are trained, with the exact ones.

    Returns:
        Relative errors.

    Raises:
        AssertionError: one is further off than 16 units of rounding of the products, or 1e-3.
    """
    found = _values(model, autocast)
    dtype = torch.bfloat16 if autocast else torch.float32
    return _compare(("loss", "grad_norm"), found, exact, dtype)


@torch.no_grad()
def check_peer(peer: object, vocab_size: int, exact: tuple[float, float]) -> dict[str, float]:
    """Compare the peer's loss with the exact one.

    Raises:
        AssertionError: it is another model.
    """
    weight = next(peer.parameters())  # type: ignore[attr-defined]
    ids, labels = _row(vocab_size, weight.device)
    logits = peer_logits(peer, ids).float()
    loss = torch.nn.functional.cross_entropy(logits[0], labels[0])
    return _compare(("loss",), (float(loss),), exact[:1], weight.dtype)


def _values(model: HybridModel, autocast: str | None) -> tuple[float, float]:
    ids, labels = _row(model.config.vocab_size, model.device)
    model.zero_grad(set_to_none=True)
    with autocast_context(model.device, autocast):
        out = model.hidden(ids).hidden
        loss = linear_cross_entropy(out, model.lm_head.weight, labels) / labels.numel()
    loss.backward()
    norm = gradient_norm(model.parameters())
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), float(norm)


def _row(vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_TOKENS)
    row = torch.randint(vocab_size, (1, _TOKENS + 1), generator=generator).to(device)
    return row[:, :-1].contiguous(), row[:, 1:].contiguous()


def _compare(
    names: tuple[str, ...], found: tuple[float, ...], exact: tuple[float, ...], dtype: torch.dtype
) -> dict[str, float]:
    allowed = max(_UNITS * torch.finfo(dtype).eps, _LEAST)
    errors = {
        f"{name}_error": abs(one - true) / abs(true)
        for name, one, true in zip(names, found, exact, strict=True)
    }
    assert max(errors.values()) <= allowed, (
        f"errors before timing must not exceed {allowed:.2g}, got {errors}"
    )
    return errors
