"""Inference: continuous batching under one memory budget, a prefix cache, sampling, text."""

from sevenfold.engine.decoding import Decoder
from sevenfold.engine.grammar import Grammar
from sevenfold.engine.llm import LLM
from sevenfold.engine.llm_output import Completion, Delta
from sevenfold.engine.request import RequestFailedError
from sevenfold.engine.request_options import RequestOptions
from sevenfold.engine.sampling import SamplingParams
from sevenfold.engine.text import TextStream
from sevenfold.engine.text_model import TextModel

__all__ = [
    "LLM",
    "Completion",
    "Decoder",
    "Delta",
    "Grammar",
    "RequestFailedError",
    "RequestOptions",
    "SamplingParams",
    "TextModel",
    "TextStream",
]
