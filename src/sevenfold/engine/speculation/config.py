"""What speculative decoding may do."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from sevenfold.config import StrictModel
from sevenfold.ops import MAX_DRAFT_TOKENS

# Drafts' keys and values beside a state; a verification takes the last known token and its draft.
RING_TOKENS = MAX_DRAFT_TOKENS

Count = Annotated[int, Field(ge=1)]


class SpeculationConfig(StrictModel):
    """What every way of drafting has.

    draft_tokens: guesses that one step checks for a request, at most.
    branches: continuations that a draft may have side by side; 1 drafts chains, more draft trees
        of draft_tokens guesses together.
    adaptive: draft where guesses were seen to be right and pay by the measured cost of a step, and
        lose no more than 2 steps and 2% beside one draft; False drafts as much as there is whatever
        it costs.
    """

    draft_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS - 1)] = 5
    branches: Count = 1
    adaptive: bool = True

    @model_validator(mode="after")
    def _check_branches(self) -> Self:
        if self.branches > self.draft_tokens:
            raise ValueError(
                f"branches must be at most draft_tokens = {self.draft_tokens}, got {self.branches}"
            )
        return self


class PromptLookupConfig(SpeculationConfig):
    """Drafts are copied from the prompt and the output, from where they last went on the same way.

    min_match_tokens: what the text's end must have in common with an earlier place.
    max_match_tokens: how far back a match is followed to tell which is longest.
    max_places: earlier places that are compared for a draft, the latest first.
    history_tokens: of the prompt, so many of the last tokens are searched.
    """

    min_match_tokens: Count = 2
    max_match_tokens: Count = 32
    max_places: Count = 16
    history_tokens: Count = 65_536

    @model_validator(mode="after")
    def _check_match(self) -> Self:
        if self.max_match_tokens < self.min_match_tokens:
            raise ValueError(
                f"max_match_tokens must be at least min_match_tokens = {self.min_match_tokens}, "
                f"got {self.max_match_tokens}"
            )
        return self


class DraftModelConfig(SpeculationConfig):
    """Drafts are decoded by a smaller model of the same tokenizer.

    memory_bytes: for the smaller model's states and keys.
    context_tokens: tokens of a request for which that memory must suffice at least.
    max_chunk_tokens: of a prompt, so many tokens a step go through the smaller model.
    """

    memory_bytes: Count
    context_tokens: Count = 4096
    max_chunk_tokens: Count = 2048
