"""What only training reads, and neither published schema has a key for.

It goes into a table of our own in config.json, which other programs ignore, so that a model comes
back from a conversion as it was. The inner names are ModelConfig's and MoEConfig's.
"""

from collections.abc import Mapping
from typing import Any

from sevenfold.config import CheckpointError, unknown_name
from sevenfold.models.checkpoint.schema import EXTRA_KEY
from sevenfold.models.config import ModelConfig

_EXTRA_MODEL = ("initialization",)
_EXTRA_MOE = ("capacity_factor", "router_z_loss_coef")


def with_extra(values: dict[str, Any], document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Add to ModelConfig's values what our own table in a published config.json holds."""
    extra = document.get(EXTRA_KEY, {})
    for key, value in extra.items():
        if key in _EXTRA_MODEL:
            values[key] = value
        elif key in _EXTRA_MOE:
            values["moe"][key] = value
        else:
            known = (*_EXTRA_MODEL, *_EXTRA_MOE)
            raise CheckpointError(f"{source}: {unknown_name(f'{EXTRA_KEY} key', key, known)}")
    return values


def extra_table(config: ModelConfig) -> dict[str, Any]:
    """Return our own table for a published config.json: what only training reads."""
    table = {key: getattr(config, key) for key in _EXTRA_MODEL}
    return table | {key: getattr(config.moe, key) for key in _EXTRA_MOE}
