"""How the next token is chosen: what a request may ask for, and the choice for a whole batch."""

from sevenfold.engine.sampling.bad_words import bad_word_tokens
from sevenfold.engine.sampling.draws import uniform
from sevenfold.engine.sampling.logprobs import Logprobs, read_logprobs
from sevenfold.engine.sampling.params import SamplingParams
from sevenfold.engine.sampling.penalties import Penalties
from sevenfold.engine.sampling.rules import Rules, build_rules, choose_tokens
from sevenfold.engine.sampling.sampler import Output, Sampler

__all__ = [
    "Logprobs",
    "Output",
    "Penalties",
    "Rules",
    "Sampler",
    "SamplingParams",
    "bad_word_tokens",
    "build_rules",
    "choose_tokens",
    "read_logprobs",
    "uniform",
]
