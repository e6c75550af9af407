"""Both sides checked before anything is timed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.bench.peer import peer_logits
from sevenfold.bench.serving.sides import Serving, Sides, random_ids
from sevenfold.models import HybridModel

_TOKENS = 256
_NEW_TOKENS = 16
# Their decay has 1e-5 in one more place than the original's (docs/checkpoints.md).
_PEER_ERROR = 1e-3


@torch.inference_mode()
def check_sides(sides: Sides) -> dict[str, float]:
    """Compare both sides' logits with our model's in fp64, the engine's tokens with our model's.

    Returns:
        The error of each side's logits: |logits - exact| / |exact|, root mean squares.

    Raises:
        AssertionError: the peer is another model, ours is further off than twice the peer, or the
            engine chose a token that is not the best of its own model within rounding.
    """
    ids = random_ids(sides.config, 1, _TOKENS).to(sides.device)
    exact = _exact(sides.model)(ids)
    eps = torch.finfo(sides.model.dtype).eps
    ours = _error(sides.model(ids), exact)
    theirs = _error(peer_logits(sides.peer, ids), exact)
    errors = {"ours_error": ours, "transformers_error": theirs}
    assert theirs < _PEER_ERROR + 8 * eps, f"the peer must be the same model, got {errors}"
    assert ours <= 2 * (theirs + eps), f"ours must keep to the error rule, got {errors}"
    prompt = ids[0].tolist()
    serving = Serving(sides.model, memory_bytes=_enough(sides))
    request = serving.submit(prompt, _NEW_TOKENS)
    serving.run()
    check_tokens(sides.model, prompt, request.generated)
    return errors


@torch.inference_mode()
def check_tokens(model: HybridModel, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """Check that each token is the best after those before it, within rounding of the logits.

    Args:
        model: the engine's.
        prompt, tokens: what it was asked, and what it chose.

    Raises:
        AssertionError: one is not.
    """
    ids = torch.tensor([[*prompt, *tokens]], device=model.device)
    hidden = model.hidden(ids).hidden[0, len(prompt) - 1 : -1]
    logits = model.logits(hidden)
    chosen = logits.gather(-1, torch.tensor(tokens, device=model.device)[:, None])[:, 0]
    short = float((logits.amax(-1) - chosen).max())
    allowed = 16 * torch.finfo(model.dtype).eps * float(logits.abs().max())
    assert short <= allowed, (
        f"the engine's tokens must be the model's best within {allowed:.2g}, got one {short:.2g} "
        "below"
    )


def _exact(model: HybridModel) -> HybridModel:
    exact = HybridModel(model.config).to(model.device, model.dtype)
    exact.load_state_dict(model.state_dict())
    return exact.double().eval()


def _error(logits: Tensor, exact: Tensor) -> float:
    return float((logits - exact).norm() / exact.norm())


def _enough(sides: Sides) -> int:
    plan = Serving(sides.model).plan
    return 8 * plan.layout.slab_bytes + 4 * plan.request_bytes(_TOKENS + _NEW_TOKENS)
