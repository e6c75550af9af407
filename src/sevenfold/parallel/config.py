"""The `[parallel]` table of a run file: how many ranks share what."""

from typing import Annotated, Literal

from pydantic import Field

from sevenfold.config import ConfigError, StrictModel
from sevenfold.models import ModelConfig
from sevenfold.parallel.context.cut import NUM_STRETCHES
from sevenfold.parallel.context.softmax import ContextAttention

_Degree = Annotated[int, Field(ge=1)]


class ParallelConfig(StrictModel):
    """Degrees whose product is the number of ranks; experts have a layout of their own beside it.

        ranks = pipeline * replicate * shard * context * tensor
        expert * expert_tensor divides shard * context * tensor

    Args:
        pipeline: stages, each with some of the layers; micro-batches follow one another.
        pipeline_stages: of each of them; above 1 they interleave.
        replicate: copies of the weights that read different rows (hybrid sharding).
        shard: ranks that read different rows and divide weights, gradients and moments.
        context: ranks that divide every row's tokens; they divide the weights as well.
        tensor: ranks that divide heads, widths and vocabulary.
        expert: ranks that divide the experts.
        expert_tensor: ranks that divide each expert's width; None is as many as tensor.
        expert_token_groups: parts of a rank's tokens that go to the experts one after another, so
            that one travels while the experts run on another.
        expert_exchange: how tokens travel to experts: "collective", the backend's all-to-all, or
            "copies", by the copy engines of the GPUs of one host, which hold no multiprocessor
            that products wait for.
        context_attention: how keys travel under context: "gather" or "ring"; None decides by their
            bytes.
        gather_once: whether weights that ranks divide stay whole from a micro-batch's forward to
            its backward, which costs their bytes, instead of being gathered for each.
        gather_dtype: "bf16" rounds the weights of the blocks' products before they are gathered,
            and not at each product; with experts, autocast and tensor = 1. None gathers fp32.
        weight_exchange: how weights that ranks divide are gathered, and their gradients summed:
            "collective" or "copies", as expert_exchange.
    """

    pipeline: _Degree = 1
    pipeline_stages: _Degree = 1
    replicate: _Degree = 1
    shard: _Degree = 1
    context: _Degree = 1
    tensor: _Degree = 1
    expert: _Degree = 1
    expert_tensor: _Degree | None = None
    expert_token_groups: _Degree = 1
    expert_exchange: Literal["collective", "copies"] = "collective"
    context_attention: ContextAttention | None = None
    gather_once: bool = False
    gather_dtype: Literal["bf16"] | None = None
    weight_exchange: Literal["collective", "copies"] = "collective"

    @property
    def num_ranks(self) -> int:
        """Processes of the run."""
        return self.pipeline * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold the same layers."""
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

    @property
    def expert_width(self) -> int:
        """Ranks that divide an expert's width."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def expert_shards(self) -> int:
        """Ranks, of those that divide the weights, that hold the same part of the experts."""
        return self.weight_shards * self.tensor // (self.expert * self.expert_width)

    @property
    def routes_tokens(self) -> bool:
        """Whether tokens travel to experts: else each rank has its tensor part of all of them."""
        return self.expert > 1 or self.expert_width != self.tensor

    def check_model(self, model: ModelConfig) -> None:
        """Raise unless the degrees divide the model's sizes.

        Raises:
            ConfigError: they do not; the message names degree, size and values.
        """
        if self.context_attention is not None and (
            self.context == 1 or not model.count("full_attention")
        ):
            raise ConfigError(
                f"parallel.context_attention must be unset without context ranks and layers of "
                f"full_attention, got {self.context_attention!r}"
            )
        if self.gather_once and self.token_ranks == 1:
            raise ConfigError(
                "parallel.gather_once must be unset where no ranks divide weights, got true with "
                "replicate * shard * context = 1"
            )
        if self.gather_dtype is not None and (
            self.token_ranks == 1 or self.tensor > 1 or model.moe is None
        ):
            raise ConfigError(
                f"parallel.gather_dtype must be unset without experts, with tensor ranks and where "
                f"no ranks divide weights, got {self.gather_dtype!r} with tensor = {self.tensor}, "
                f"replicate * shard * context = {self.token_ranks}"
            )
        if self.weight_exchange == "copies" and self.weight_shards == 1:
            raise ConfigError(
                'parallel.weight_exchange must be "collective" where no ranks divide weights, got '
                '"copies" with shard * context = 1'
            )
        if self.expert_exchange == "copies" and self.expert == 1:
            raise ConfigError(
                'parallel.expert_exchange must be "collective" where no ranks divide the experts, '
                'got "copies" with expert = 1'
            )
        self._check_pipeline(model)
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
        self._check_experts(model)

    def _check_pipeline(self, model: ModelConfig) -> None:
        if self.pipeline == 1:
            if self.pipeline_stages > 1:
                raise ConfigError(
                    f"parallel.pipeline_stages must be 1 without pipeline ranks, got "
                    f"{self.pipeline_stages}"
                )
            return
        count = self.pipeline * self.pipeline_stages
        if count > model.num_hidden_layers:
            raise ConfigError(
                f"parallel: pipeline * pipeline_stages must not exceed num_hidden_layers = "
                f"{model.num_hidden_layers}, got {count}"
            )
        if model.tie_word_embeddings:
            raise ConfigError(
                f"parallel.pipeline must be 1 with tie_word_embeddings, whose weight the first and "
                f"last stage would share, got {self.pipeline}"
            )

    def check_micro_batches(self, num_rows: int, micro_batch_rows: int) -> None:
        """Raise unless a step's micro-batches suit the pipeline: equal, and enough of them.

        Args:
            num_rows: of a step.
            micro_batch_rows: of a micro-batch.

        Raises:
            ConfigError: they do not.
        """
        if self.pipeline == 1:
            return
        name = "the rows of a step"
        _check_divides("micro_batch_rows, under pipeline,", micro_batch_rows, name, num_rows)
        count = num_rows // micro_batch_rows
        if count < self.pipeline or (self.pipeline_stages > 1 and count % self.pipeline):
            rule = "a multiple of" if self.pipeline_stages > 1 else "at least"
            raise ConfigError(
                f"parallel: the micro-batches of a step must be {rule} pipeline = {self.pipeline}, "
                f"got {count}; set batch.micro_batch_rows"
            )

    def _check_experts(self, model: ModelConfig) -> None:
        if model.moe is None:
            named = {"expert": self.expert, "expert_token_groups": self.expert_token_groups}
            named["expert_tensor"] = self.expert_tensor or 1
            for name, value in named.items():
                if value > 1:
                    raise ConfigError(
                        f"parallel.{name} must be 1 for a model without experts, got {value}"
                    )
            return
        if self.expert_token_groups > 1 and not self.routes_tokens:
            raise ConfigError(
                f"parallel.expert_token_groups must be 1 where no tokens travel to experts, got "
                f"{self.expert_token_groups}"
            )
        _check_divides("expert", self.expert, "num_local_experts", model.moe.num_local_experts)
        width = "intermediate_size"
        _check_divides("expert_tensor", self.expert_width, width, model.intermediate_size)
        ranks = self.weight_shards * self.tensor
        size = self.expert * self.expert_width
        _check_divides("expert * expert_tensor", size, "shard * context * tensor", ranks)
        if self.routes_tokens and self.token_ranks == 1 and self.expert_shards > 1:
            raise ConfigError(
                f"parallel: expert * expert_tensor must be tensor = {self.tensor} where all ranks "
                f"hold the same tokens, got {size}"
            )
        name = "shard * context * tensor / (expert * expert_tensor)"
        _check_divides(name, self.expert_shards, "hidden_size", model.hidden_size)

    def check_rows(self, num_rows: int, seq_len: int, *, rule: str) -> None:
        """Raise unless rows divide among data ranks, and their tokens in two for each context rank.

        Args:
            num_rows: of a micro-batch.
            seq_len: tokens of a row.
            rule: what has these rows, for the message.

        Raises:
            ConfigError: they do not.
        """
        _check_divides("replicate * shard", self.data, f"the rows of {rule}", num_rows)
        if self.context > 1:
            tokens, name = num_rows // self.data * seq_len, f"the tokens of a rank's rows in {rule}"
            _check_divides("2 * context", NUM_STRETCHES * self.context, name, tokens)
        if self.routes_tokens and self.tensor > 1:
            tokens = num_rows // self.data * seq_len // self.context
            if self.context > 1:
                tokens //= NUM_STRETCHES
            _check_divides("tensor", self.tensor, f"the tokens of a stretch in {rule}", tokens)


def _tensor_sizes(model: ModelConfig) -> dict[str, int]:
    """What tensor parallelism divides."""
    sizes = {
        "vocab_size": model.vocab_size,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size,
    }
    if model.linear_attn_norm_groups > 1 and model.count("linear_attention"):
        sizes["linear_attn_norm_groups"] = model.linear_attn_norm_groups
    if model.count("linear_attention") < model.num_hidden_layers:
        sizes["num_key_value_heads"] = model.num_key_value_heads
    if model.moe is not None and model.moe.shared_intermediate_size is not None:
        sizes["shared_intermediate_size"] = model.moe.shared_intermediate_size
    return sizes


def _check_divides(degree: str, value: int, name: str, size: int) -> None:
    if size % value:
        raise ConfigError(f"parallel: {degree} must divide {name} = {size}, got {value}")
