"""Checks of arguments that callers hand over."""

from types import UnionType


def check_type(name: str, value: object, kind: type | UnionType, rule: str) -> None:
    """Raise TypeError, `name must be rule, got value`, unless a value is of a kind.

    A bool is not taken for a number.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {rule}, got {value!r}")
