"""Inference: incremental decoding with a hybrid cache, sampling, text."""

from sevenfold.engine.decoding import Decoder
from sevenfold.engine.llm import LLM, Completion, Delta
from sevenfold.engine.sampling import SamplingParams
from sevenfold.engine.text import TextStream

__all__ = [
    "LLM",
    "Completion",
    "Decoder",
    "Delta",
    "SamplingParams",
    "TextStream",
]
