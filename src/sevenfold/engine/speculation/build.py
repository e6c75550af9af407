"""From a configuration to what speculates."""

from tokenizers import Tokenizer

from sevenfold.config import ConfigError
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.speculation.config import (
    DraftModelConfig,
    PromptLookupConfig,
    SpeculationConfig,
)
from sevenfold.engine.speculation.draft_model import DraftModel, ModelDrafter
from sevenfold.engine.speculation.drafter import Drafter
from sevenfold.engine.speculation.prompt_lookup import PromptLookup
from sevenfold.models import HybridModel


def build_drafter(
    config: SpeculationConfig, draft: DraftModel | None, model: HybridModel, tokenizer: Tokenizer
) -> Drafter:
    """Build the way of drafting that a configuration names.

    Args:
        config: a PromptLookupConfig or a DraftModelConfig.
        draft: the smaller model, with a DraftModelConfig only.
        model, tokenizer: what it drafts for.

    Raises:
        ConfigError: the smaller model is missing, superfluous, or of another tokenizer.
    """
    if isinstance(config, DraftModelConfig):
        if draft is None:
            raise ConfigError("draft must be a DraftModel with a DraftModelConfig, got None")
        draft.check_serves(model, tokenizer)
        return ModelDrafter(config, draft)
    if not isinstance(config, PromptLookupConfig):
        raise ConfigError(
            "speculation must be a PromptLookupConfig or a DraftModelConfig, got a "
            f"{type(config).__name__}"
        )
    if draft is not None:
        raise ConfigError("draft must be None with a PromptLookupConfig, got a DraftModel")
    return PromptLookup(config)


def check_speculates(
    config: SpeculationConfig | None, draft: DraftModel | None, plan: MemoryPlan
) -> None:
    """Raise ConfigError where nothing would use a draft model, or a plan has no room for drafts."""
    if config is None:
        if draft is not None:
            raise ConfigError("draft must be None without speculation, got a DraftModel")
    elif plan.has_states and plan.ring_tokens < config.draft_tokens + 1:
        raise ConfigError(
            f"plan.ring_tokens must be at least draft_tokens + 1 = {config.draft_tokens + 1} to "
            f"speculate, got {plan.ring_tokens}; plan_memory(..., ring_tokens=RING_TOKENS)"
        )
