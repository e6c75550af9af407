"""Strict configuration: TOML in, frozen objects out, every mistake named with its remedy."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from sevenfold.config.errors import ConfigError

if TYPE_CHECKING:
    # By it type checkers know the arguments of every configuration.
    from pydantic._internal._model_construction import ModelMetaclass as _Named
else:

    class _Named(type(BaseModel)):
        """Makes faults of a call read as those of a file do; validation itself never comes here."""

        def __call__(cls, *positional, **values):
            try:
                return super().__call__(*positional, **values)
            except ValidationError as error:
                raise ConfigError(_faults(cls, error, cls.__name__)) from None


class StrictModel(BaseModel, metaclass=_Named):
    """A frozen configuration object that refuses unknown keys and never converts types.

    Raises:
        ConfigError: a key is unknown or missing, or a value breaks its rule. All faults are listed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def as_tuple(value: object) -> object:
    """Return a list as a tuple and all else as it is: for fields that callers write as a list."""
    return tuple(value) if isinstance(value, list) else value


Config = TypeVar("Config", bound=StrictModel)


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that looks most like a misspelt one, or None when none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return close[0] if close else None


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """Return the message for a name that is not among the known ones, nearest first."""
    nearest = nearest_name(name, known)
    hint = f"did you mean {nearest!r}?" if nearest else f"known: {', '.join(sorted(known))}"
    return f"{kind} must be a known name, got {name!r}; {hint}"


def parse_config(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Validate plain values into a configuration object.

    Args:
        cls: the StrictModel to build.
        values: nested mapping as tomllib or json returns it.
        source: what the values came from (a file name), for messages.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: a key is unknown or missing, or a value breaks its rule. All faults are listed.
    """
    try:
        # By way of JSON: strict mode then takes a list for a tuple and a string for a path.
        return cls.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(_faults(cls, error, source)) from error


def read_toml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file, resolve its `extends`, and apply `a.b=value` overrides.

    Args:
        path: the file; its top-level key `extends` may name a base file relative to it.
        overrides: each `dotted.key=value`; the value is TOML, or a bare string.

    Returns:
        The merged tables, without `extends`.

    Raises:
        ConfigError: the file is missing, is not TOML, extends itself, or an override has no `=`.
    """
    values = _read_with_base(path, seen=())
    for override in overrides:
        _apply_override(values, override)
    return values


def merge_tables(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return base with every key of top laid over it, tables merged key by key."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge_tables(below, value)
        else:
            merged[key] = value
    return merged


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: extends must not lead back to itself")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: must be TOML: {error}") from error
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be a file name, got {base!r}")
    return merge_tables(_read_with_base(path.parent / base, (*seen, path)), values)


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set must read key=value, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = values
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {dotted}: {key} must be a table, got {table!r}")
    table[keys[-1]] = value


def _faults(cls: type[BaseModel], error: ValidationError, source: str) -> str:
    return f"{source}: " + "; ".join(_fault(cls, fault) for fault in error.errors())


def _fault(cls: type[BaseModel], fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _fields_at(cls, fault["loc"][:-1])
        name = str(fault["loc"][-1])
        nearest = nearest_name(name, known)
        prefix = where[: -len(name)]
        hint = f"did you mean {prefix}{nearest}?" if nearest else f"known: {', '.join(known)}"
        return f"{where} is not a known key; {hint}"
    if fault["type"] == "missing":
        return f"{where} must be given"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return message if message.startswith(where) else f"{where}: {message}"
    return f"{where} must be valid: {message}, got {fault['input']!r}"


def _fields_at(cls: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue  # an item of a list: its model was found in the list's own annotation
        field = cls.model_fields.get(part)
        below = _model_in(field.annotation) if field else None
        if below is None:
            break
        cls = below
    return list(cls.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)
