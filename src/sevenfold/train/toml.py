"""Writing a configuration as TOML."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def to_toml(values: Mapping[str, Any]) -> str:
    """Write nested plain values as TOML; a key whose value is None is left out.

    Args:
        values: strings, numbers, booleans, sequences and tables, as a JSON dump gives them.

    Returns:
        The text; tomllib reads the same values from it.
    """
    return "\n".join(_table(values, ())).strip("\n") + "\n"


def _table(values: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = ["", f"[{'.'.join(path)}]"] if path else []
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    for key, value in values.items():
        if value is not None and key not in tables:
            lines.append(f"{key} = {_value(value)}")
    for key, value in tables.items():
        lines += _table(value, (*path, key)) if value else []
    return lines


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{key} = {_value(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    # A TOML string escapes as JSON's does; numbers and booleans read alike.
    return json.dumps(value, ensure_ascii=False)
