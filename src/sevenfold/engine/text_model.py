"""A model with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from tokenizers import Tokenizer

from sevenfold.config import CheckpointError, ConfigError
from sevenfold.engine.quantised_weights import load_quantised_model
from sevenfold.engine.tensor_parallel import Ranks, start_ranks
from sevenfold.models import HybridModel
from sevenfold.models.accounting import WeightFormat
from sevenfold.models.checkpoint import load_model


@dataclass(frozen=True)
class TextModel:
    """A model that reads and writes text; it is put into eval mode.

    tokenizer: with at most the model's vocab_size tokens.
    ranks: the processes that hold the other parts of the model; None where it is whole.
    """

    model: HybridModel
    tokenizer: Tokenizer
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        most, size = self.model.config.vocab_size, self.tokenizer.get_vocab_size()
        if size > most:
            raise CheckpointError(
                f"tokenizer must have at most the model's {most} tokens, got {size}"
            )
        self.model.eval()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        weights: WeightFormat | None = None,
        tensor_parallel: int = 1,
    ) -> Self:
        """Load a checkpoint directory and the tokenizer.json in it.

        Args:
            path: the directory, in any format that load_model reads.
            device: where to run.
            dtype: of the weights; None keeps the file's.
            weights: which matrices to quantise as they are read, and to what; None none.
            tensor_parallel: ranks that divide every matrix, each a process of this machine; on
                "cuda" each has a GPU of its own.

        Raises:
            CheckpointError: the checkpoint or its tokenizer cannot be read.
            ConfigError: weights has no effect on the model, or tensor_parallel does not divide its
                sizes or has too few GPUs.
            UnsupportedError: weights are to be fp8 on a GPU that has none.
        """
        if not Path(path).is_dir():
            raise CheckpointError(f"{path} must be a checkpoint folder, got none of that name")
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            final = Path(path) / "final"
            remedy = f"{final} has one" if final.is_dir() else "copy the tokenizer there"
            raise CheckpointError(f"{file} must exist to generate text; {remedy}")
        if tensor_parallel != 1:
            if tensor_parallel < 1:
                raise ConfigError(f"tensor_parallel must be 1 or more, got {tensor_parallel}")
            model, ranks = start_ranks(
                Path(path), tensor_parallel, device=device, dtype=dtype, weights=weights
            )
            return cls(model, _read_tokenizer(file), ranks)
        if weights is None:
            model = load_model(Path(path), device=device, dtype=dtype)
        else:
            model = load_quantised_model(Path(path), weights, device=device, dtype=dtype)
        return cls(model, _read_tokenizer(file))


def _read_tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception itself
        raise CheckpointError(f"{file} must be a tokenizer's JSON, got {error}") from error
