"""What a cached prefix saves: FLOPs of a prefill as a formula that costs nothing to evaluate."""

from dataclasses import dataclass
from typing import Self

from sevenfold.models import ModelConfig
from sevenfold.models.accounting import prefill_flops


@dataclass(frozen=True)
class PrefillCost:
    """prefill_flops(n) = per_token * n + full * n (n + 1) / 2 + sliding * pairs in a window.

    full, sliding: FLOPs of one pair of tokens in all layers of the kind.
    """

    per_token: int
    full: int
    sliding: int
    window_tokens: int

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """Take the coefficients from the model's accounting."""
        pair = 4 * config.num_attention_heads * config.head_dim
        full = pair * config.count("full_attention")
        sliding = pair * config.count("sliding_attention")
        # One token makes one pair in each softmax layer.
        per_token = prefill_flops(config, 1) - full - sliding
        return cls(per_token, full, sliding, config.sliding_window or 0)

    def flops(self, num_tokens: int) -> int:
        """FLOPs of the first num_tokens tokens of a sequence."""
        window = min(self.window_tokens, num_tokens)
        pairs = num_tokens * (num_tokens + 1) // 2
        windowed = window * (window + 1) // 2 + (num_tokens - window) * window
        return self.per_token * num_tokens + self.full * pairs + self.sliding * windowed
