"""The two sides of a serving benchmark: our engine and transformers' model, same weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from sevenfold.bench.kernels.timing import ceilings
from sevenfold.bench.measure import matmul_flops_per_s, read_bytes_per_s
from sevenfold.bench.peer import load_peer
from sevenfold.engine import SamplingParams, TextModel
from sevenfold.engine.engine import Engine
from sevenfold.engine.request import Request
from sevenfold.engine.sizing import size_engine
from sevenfold.engine.speculation import SpeculationConfig
from sevenfold.engine.tensor_parallel import Ranks
from sevenfold.engine.token_ids import TokenIds
from sevenfold.models import HybridModel, ModelConfig, init_weights, preset


@dataclass(frozen=True)
class Rates:
    """What the machine can do: of products in the model's dtype, and of reading memory."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Sides:
    """Our model and transformers', in eval mode on one device in one dtype."""

    config: ModelConfig
    model: HybridModel
    peer: Any
    rates: Rates

    @property
    def device(self) -> torch.device:
        """Where both lie."""
        return self.model.device


def build_sides(preset_name: str, device: str, dtype: torch.dtype) -> Sides:
    """Build a preset with random weights on both sides, and measure the machine.

    Rotation covers the whole head: transformers' class knows nothing else. Positions reach as far
    as those of the released model.

    Raises:
        ConfigError: there is no such preset.
        UnsupportedError: transformers is not installed.
    """
    named = preset(preset_name)
    reach = preset("minimax-text-01").max_position_embeddings
    changed = {"rotary_dim": named.head_dim, "max_position_embeddings": reach}
    config = named.model_copy(update=changed)
    where = torch.device(device)
    with where:
        model = init_weights(HybridModel(config), seed=0, drawn_on=where)
    model = model.to(where, dtype).eval().requires_grad_(False)
    peer = load_peer(model, device=where, dtype=dtype).eval()
    return Sides(config, model, peer, measured_rates(where))


def measured_rates(device: torch.device) -> Rates:
    """Measure a device's ceilings."""
    if device.type == "cpu":
        return Rates(matmul_flops_per_s(), read_bytes_per_s())
    found = ceilings(device)
    return Rates(found["matmul_flops_per_s"], found["copy_bytes_per_s"])


class Serving:
    """Our engine, asked for tokens by ids; every request without a name shares nothing."""

    def __init__(
        self,
        model: HybridModel,
        *,
        memory_bytes: int | None = None,
        speculation: SpeculationConfig | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Allocate memory; None takes a share of what is free.

        ranks: with the other parts of the model, if there are any.
        """
        self.source = TextModel(model, _tokenizer(model.config.vocab_size))
        self.plan, self.limits = size_engine(
            model, budget_bytes=memory_bytes, speculation=speculation
        )
        self.engine = Engine(
            model,
            self.source.tokenizer,
            self.plan,
            self.limits,
            speculation=speculation,
            ranks=ranks,
        )
        self._names = count()

    def submit(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        *,
        salt: bytes | None = None,
        turn: int = 0,
        params: SamplingParams | None = None,
    ) -> Request:
        """Let a request wait.

        Args:
            prompt: token ids; TokenIds are packed already, as a server has them.
            new_tokens: to generate.
            salt: requests of one find what others of it have cached; None finds nothing.
            turn: tokens after which its last turn ends; 0 for none.
            params: with max_tokens of new_tokens; None is greedy, and ends at no token.
        """
        name = str(next(self._names))
        marks = (turn,) if turn else ()
        salt = name.encode() if salt is None else salt
        ids = prompt if isinstance(prompt, TokenIds) else TokenIds(prompt)
        request = Request(name, ids, new_tokens, marks=marks, salt=salt)
        self.engine.submit(request, params or _greedy(new_tokens))
        return request

    def steps(self) -> Iterator[int]:
        """Take steps until all requests have ended; how many tokens each of them gave."""
        while self.engine.has_work:
            yield sum(event.token_id is not None for event in self.engine.step())

    def run(self) -> None:
        """Serve all requests to their ends."""
        for _ in self.steps():
            continue


@cache
def _greedy(new_tokens: int) -> SamplingParams:
    """Made once, as whoever asks often makes them: checking them takes longer than to submit."""
    return SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)


def random_ids(config: ModelConfig, *shape: int) -> torch.Tensor:
    """Token ids [*shape], the same for the same shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(config.vocab_size, shape, generator=generator)


def _tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of as many tokens; nothing is encoded by it."""
    return Tokenizer(BPE({f"<{n}>": n for n in range(vocab_size)}, []))
