"""A tiny byte-level tokenizer."""

import pytest
import torch
from engine_helpers import EOS, VOCAB_SIZE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "the river held its colour while nine grey herons stood quite still beside old stones"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """All bytes, some merges, one special token; exactly VOCAB_SIZE tokens."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator([TEXT] * 3, trainer)
    assert built.get_vocab_size() == VOCAB_SIZE
    return built
