"""What a model takes on several devices, and how much context they leave."""

from dataclasses import dataclass

from sevenfold.config import ConfigError
from sevenfold.models.accounting import (
    WeightFormat,
    count_parameters,
    kv_bytes,
    state_bytes,
    weight_bytes,
    weight_scale_bytes,
)
from sevenfold.models.config import ModelConfig


@dataclass(frozen=True)
class Deployment:
    """A model by tensor parallelism; all figures are of one device.

    weight_bytes: at most; a matrix that must be whole somewhere counts as whole everywhere.
    state_bytes: one request's linear state, fp32. kv_bytes_per_token: in all softmax layers.
    free_bytes: beside the weights and what is reserved.
    """

    num_devices: int
    device_bytes: int
    reserved_bytes: int
    weight_bytes: int
    state_bytes: int
    kv_bytes_per_token: int

    @property
    def fits(self) -> bool:
        """Whether the weights and one request's state do."""
        return self.free_bytes >= self.state_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that states, keys and values may take; below 0 where the weights do not fit."""
        return self.device_bytes - self.reserved_bytes - self.weight_bytes

    @property
    def context_tokens(self) -> int | None:
        """Tokens that one request alone may reach; None when none is too many."""
        if not self.kv_bytes_per_token:
            return None
        return max(0, self.free_bytes - self.state_bytes) // self.kv_bytes_per_token


def plan_deployment(
    config: ModelConfig,
    *,
    num_devices: int,
    device_bytes: int,
    weights: WeightFormat | None = None,
    element_bytes: int = 2,
    reserved_share: float = 0.1,
) -> Deployment:
    """Count what each of N devices holds when a model is cut by tensor parallelism.

        weights = (all - whole) / N + whole, whole: norms, routers, scales
        state of H / N heads        keys and values of G / N heads, one at least

    Args:
        config: the model.
        num_devices: N, which divides the heads.
        device_bytes: memory of one device.
        weights: which matrices are in 8 bits; None leaves all as they are.
        element_bytes: of what is not, keys and values included; 2 for bf16.
        reserved_share: of device_bytes, for activations, graphs and the driver; 0 to below 1.

    Returns:
        The plan.

    Raises:
        ConfigError: N does not divide the heads, or reserved_share lies outside its range.
    """
    H, G = config.num_attention_heads, config.num_key_value_heads
    if num_devices < 1 or H % num_devices:
        raise ConfigError(f"num_devices must divide num_attention_heads = {H}, got {num_devices}")
    if not 0 <= reserved_share < 1:
        raise ConfigError(f"reserved_share must lie in 0 to below 1, got {reserved_share}")
    heads = max(1, -(-G // num_devices))
    return Deployment(
        num_devices=num_devices,
        device_bytes=device_bytes,
        reserved_bytes=int(device_bytes * reserved_share),
        weight_bytes=_weights(config, num_devices, weights, element_bytes),
        state_bytes=state_bytes(config) // num_devices,
        kv_bytes_per_token=kv_bytes(config, 1, element_bytes) * heads // G,
    )


def _weights(
    config: ModelConfig, num_devices: int, weights: WeightFormat | None, element_bytes: int
) -> int:
    counts = count_parameters(config)
    total = weight_bytes(config, weights, element_bytes)
    whole = counts.norms * element_bytes + counts.router * max(4, element_bytes)
    whole += weight_scale_bytes(config, weights)
    return -(-(total - whole) // num_devices) + whole
