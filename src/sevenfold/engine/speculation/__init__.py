"""Speculative decoding: guesses of the next tokens, checked together in one run of the model."""

from sevenfold.engine.speculation.acceptance import Taken, Walk
from sevenfold.engine.speculation.build import build_drafter, check_speculates
from sevenfold.engine.speculation.config import (
    RING_TOKENS,
    DraftModelConfig,
    PromptLookupConfig,
    SpeculationConfig,
)
from sevenfold.engine.speculation.draft_model import DraftModel
from sevenfold.engine.speculation.pending import PendingDrafts
from sevenfold.engine.speculation.speculator import Drafted, SpeculationCounters, Speculator
from sevenfold.engine.speculation.verifier import Verifier

__all__ = [
    "RING_TOKENS",
    "DraftModel",
    "DraftModelConfig",
    "Drafted",
    "PendingDrafts",
    "PromptLookupConfig",
    "SpeculationConfig",
    "SpeculationCounters",
    "Speculator",
    "Taken",
    "Verifier",
    "Walk",
    "build_drafter",
    "check_speculates",
]
