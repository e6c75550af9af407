"""The table of presets in docs/model.md says what the presets are."""

import re
from pathlib import Path

from sevenfold.models import ModelConfig, preset, preset_names
from sevenfold.models.accounting import count_parameters

PAGE = Path(__file__).parent.parent.parent / "docs" / "model.md"
ROW = re.compile(r"^\| `([\w-]+)` \| (.+) \|$", re.MULTILINE)


def feed_forward(config: ModelConfig) -> str:
    width = f"{config.intermediate_size:,}"
    return width if config.moe is None else f"{config.moe.num_local_experts} experts of {width}"


def cells(config: ModelConfig) -> list[str]:
    counts = count_parameters(config)
    sizes = (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.head_dim,
    )
    rest = (config.vocab_size, counts.total, counts.active)
    return [*(f"{n:,}" for n in sizes), feed_forward(config), *(f"{n:,}" for n in rest)]


def test_the_table_of_presets_is_right_and_whole() -> None:
    shown = {name: row.split(" | ") for name, row in ROW.findall(PAGE.read_text())}
    twins = ("-softmax", "-lightning")
    wanted = [name for name in preset_names() if not name.endswith(twins) and name != "nano"]
    assert sorted(shown) == sorted(wanted)
    assert shown == {name: cells(preset(name)) for name in wanted}
