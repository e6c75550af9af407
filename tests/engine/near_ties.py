"""Which tokens a run in low precision may choose: the best, or one that the error rule allows."""

import copy
from functools import cache

import torch
from torch import Tensor

from sevenfold.models import HybridModel
from sevenfold.ops.testing import error_bound


def check_near_greedy(tokens: list[int], exact: Tensor, eager: Tensor) -> int:
    """Fail unless each token's exact logit lies within the error rule of the largest.

    Args:
        tokens: T, chosen one after another, each after those before it.
        exact: [T, vocab_size] fp64, the logits that each was chosen from.
        eager: the same by eager PyTorch from weights in the run's dtype, fp32 as a run's logits.

    Returns:
        How many of them leave no choice: no second logit lies within the rule of the largest.
    """
    bound = error_bound(exact, eager)
    best = exact.topk(2).values
    for n, token in enumerate(tokens):
        gap = float(best[n, 0] - exact[n, token])
        assert gap <= bound < float("inf"), (
            f"token {n}, {token}, lies {gap:.3e} below the best: the error rule allows {bound:.3e}"
        )
    return int((best[:, 0] - best[:, 1] > bound).sum())


class Judge:
    """Judges outputs of a model by whole rows without any cache, on the CPU.

    num_tokens, num_decided: of those judged, and those among them that left no choice.
    """

    def __init__(self, model: HybridModel) -> None:
        self._eager = copy.deepcopy(model).cpu()
        self._exact = copy.deepcopy(self._eager).double()
        self._logits = cache(self._logits_of)
        self.num_tokens = self.num_decided = 0

    def check(self, prompt: tuple[int, ...], output: list[int]) -> None:
        """Fail unless an output is greedy, but for near ties."""
        self.num_decided += check_near_greedy(output, *self._logits(prompt, tuple(output[:-1])))
        self.num_tokens += len(output)

    def _logits_of(self, prompt: tuple[int, ...], known: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        row = torch.tensor([[*prompt, *known]])
        with torch.inference_mode():
            first = len(prompt) - 1
            return self._exact(row)[0, first:], self._eager(row)[0, first:]
