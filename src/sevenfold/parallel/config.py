"""The `[parallel]` table of a run file: how many ranks share what."""

from typing import Annotated

from pydantic import Field

from sevenfold.config import ConfigError, StrictModel
from sevenfold.models import ModelConfig

_Degree = Annotated[int, Field(ge=1)]


class ParallelConfig(StrictModel):
    """Degrees whose product is the number of ranks, expert apart.

        ranks = replicate * shard * context * tensor        expert divides shard * context

    Args:
        replicate: copies of the weights that read different rows (hybrid sharding).
        shard: ranks that read different rows and divide weights, gradients and moments.
        context: ranks that divide every row's tokens; they divide the weights as well.
        tensor: ranks that divide heads, widths and vocabulary.
        expert: ranks, of shard * context, that divide the experts.
    """

    replicate: _Degree = 1
    shard: _Degree = 1
    context: _Degree = 1
    tensor: _Degree = 1
    expert: _Degree = 1

    @property
    def num_ranks(self) -> int:
        """Processes of the run."""
        return self.token_ranks * self.tensor

    @property
    def token_ranks(self) -> int:
        """Ranks that hold different tokens."""
        return self.data * self.context

    @property
    def data(self) -> int:
        """Ranks that hold different rows."""
        return self.replicate * self.shard

    @property
    def weight_shards(self) -> int:
        """Ranks that divide a weight which neither tensor nor expert divides."""
        return self.shard * self.context

    def check_model(self, model: ModelConfig) -> None:
        """Raise unless the degrees divide the model's sizes.

        Raises:
            ConfigError: they do not; the message names degree, size and values.
        """
        if self.num_ranks == 1:
            return
        _check_divides("shard * context", self.weight_shards, "hidden_size", model.hidden_size)
        if model.count("linear_attention"):
            # The norm's weight lies along the heads alone, so both divide it.
            inner = model.num_attention_heads * model.head_dim
            degree, name = "shard * context * tensor", "num_attention_heads * head_dim"
            _check_divides(degree, self.weight_shards * self.tensor, name, inner)
        for name, size in _tensor_sizes(model).items():
            _check_divides("tensor", self.tensor, name, size)
        if self.expert > 1 and model.moe is None:
            raise ConfigError(
                f"parallel.expert must be 1 for a model without experts, got {self.expert}"
            )
        if model.moe is not None:
            _check_divides("expert", self.expert, "num_local_experts", model.moe.num_local_experts)
        _check_divides("expert", self.expert, "shard * context", self.weight_shards)

    def check_rows(self, num_rows: int, seq_len: int, *, rule: str) -> None:
        """Raise unless rows divide among the data ranks, and their tokens among context ranks.

        Args:
            num_rows: of a micro-batch.
            seq_len: tokens of a row.
            rule: what has these rows, for the message.

        Raises:
            ConfigError: they do not.
        """
        _check_divides("replicate * shard", self.data, f"the rows of {rule}", num_rows)
        tokens = num_rows // self.data * seq_len
        _check_divides("context", self.context, f"the tokens of a rank's rows in {rule}", tokens)


def _tensor_sizes(model: ModelConfig) -> dict[str, int]:
    """What tensor parallelism divides."""
    sizes = {
        "vocab_size": model.vocab_size,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size,
    }
    if model.count("linear_attention") < model.num_hidden_layers:
        sizes["num_key_value_heads"] = model.num_key_value_heads
    if model.moe is not None and model.moe.shared_intermediate_size is not None:
        sizes["shared_intermediate_size"] = model.moe.shared_intermediate_size
    return sizes


def _check_divides(degree: str, value: int, name: str, size: int) -> None:
    if size % value:
        raise ConfigError(f"parallel: {degree} must divide {name} = {size}, got {value}")
