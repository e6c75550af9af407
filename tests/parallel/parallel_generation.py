"""A tiny model with large weights, and its greedy tokens by the decoder and by the engine."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sevenfold.engine import SamplingParams
from sevenfold.engine.decoding import Decoder
from sevenfold.engine.engine import Engine
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.options import worker_config
from sevenfold.engine.request import Request
from sevenfold.engine.sizing import size_engine
from sevenfold.engine.speculation import PromptLookupConfig
from sevenfold.engine.tensor_parallel import Channel, LeadingWorker, follow
from sevenfold.engine.worker import Worker, WorkerConfig
from sevenfold.models import HybridModel, ModelConfig, MoEConfig, init_weights

LETTERS = {"l": "linear_attention", "f": "full_attention", "s": "sliding_attention"}
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], list(range(20, 60))]
NUM_TOKENS = 6
CHAIN = PromptLookupConfig(min_match_tokens=1, adaptive=False)
TREE = PromptLookupConfig(draft_tokens=7, branches=3, min_match_tokens=1, adaptive=False)
VOCAB_SIZE = 300


def model_of(layers: str, experts: bool) -> HybridModel:
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        layer_types=tuple(LETTERS[letter] for letter in layers),
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=12,
        rotary_dim=4,
        sliding_window=4 if "s" in layers else None,
        max_position_embeddings=200,
        moe=MoEConfig(num_local_experts=4) if experts else None,
    )
    model = init_weights(HybridModel(config), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(2 * noise * parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def generate(model: HybridModel) -> dict[str, list[list[int]]]:
    """Greedy tokens of PROMPTS, all at once, by the decoder, by the engine, and without a cache."""
    return {
        "decoder": by_decoder(model, NUM_TOKENS),
        "engine": by_engine(model),
        "uncached": uncached(model),
    }


def by_decoder(model: HybridModel, num_tokens: int) -> list[list[int]]:
    decoder = Decoder(model, PROMPTS, capacity_tokens=64)
    rows = [decoder.prefill(32).argmax(-1).tolist()]
    while len(rows) < num_tokens:
        rows.append(decoder.step(rows[-1]).argmax(-1).tolist())
    return [list(tokens) for tokens in zip(*rows, strict=True)]


def by_engine(model: HybridModel) -> list[list[int]]:
    # Ranks must schedule alike, so none may look at the memory that happens to be free.
    plan, config = size_engine(model, budget_bytes=4 << 20)
    engine = Engine(model, byte_tokenizer(), plan, config)
    for n, prompt in enumerate(PROMPTS):
        request = Request(str(n), tuple(prompt), NUM_TOKENS)
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        engine.submit(request, params)
    found: list[list[int]] = [[] for _ in PROMPTS]
    while engine.has_work:
        for event in engine.step():
            if event.token_id is not None:
                found[int(event.request_id)].append(event.token_id)
    return found


def serve(model: HybridModel, channel: Channel | None = None) -> list[list[list[int]]] | None:
    """Tokens of every kind of serving; None on a rank that follows."""
    found = []
    for speculation in (None, CHAIN, TREE):
        plan, config = size_engine(model, budget_bytes=4 << 20, speculation=speculation)
        how = worker_config(config, None, speculation)
        if channel is None or channel.is_first:
            ranks = None if channel is None else Leading(model, channel)
            engine = Engine(
                model, byte_tokenizer(), plan, config, speculation=speculation, ranks=ranks
            )
            found.append(two_turns(engine))
            if ranks is not None:
                ranks.worker.stop()
        else:
            follow(Worker(model, plan, how), channel)
    return found or None


class Leading:
    """Ranks that are processes already."""

    def __init__(self, model: HybridModel, channel: Channel) -> None:
        self.model, self.channel = model, channel

    def lead(self, plan: MemoryPlan, config: WorkerConfig) -> LeadingWorker:
        self.worker = LeadingWorker(self.model, plan, config, self.channel)
        return self.worker


def two_turns(engine: Engine) -> list[list[int]]:
    """Greedy tokens of repeating prompts of several lengths, and of a second turn of one."""
    texts = [[1, 2, 3] * 30, [9], [20, 21, 22, 23, 24] * 9]
    answers = [ask(engine, text, f"first {n}") for n, text in enumerate(texts)]
    second = [*texts[0], *answers[0], 7]
    answers.append(ask(engine, second, "second"))
    assert engine.counters().hit_tokens >= 64
    return answers


def ask(engine: Engine, prompt: list[int], name: str) -> list[int]:
    request = Request(name, tuple(prompt), 12)
    engine.submit(request, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    while engine.has_work:
        engine.step()
    return request.generated


@torch.inference_mode()
def uncached(model: HybridModel) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def byte_tokenizer() -> Tokenizer:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(["the river held its colour while nine grey herons stood"], trainer)
    return built
