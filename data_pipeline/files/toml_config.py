"""Load a pydantic model from a TOML file and `key=value` overrides, with errors a person can act on."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from data_pipeline.files.json_text import MAX_DEPTH, check_depth, parse_json
from data_pipeline.files.nearest_word import did_you_mean
from data_pipeline.files.os_errors import naming
from data_pipeline.files.printable import printable

Model = TypeVar("Model", bound=BaseModel)
_LONGEST_TEXT = 10_000_000
"""Characters of a config. A plan of a large comparison has some hundred thousand."""
_LONG_INTEGER = "an integer of more than 64 bits"
_LONGEST_SHOWN = 1000
"""Characters of an illegal value that a message shows."""


class ConfigError(ValueError):
    """A mistake that a user can mend: the message names file, field, value, legal values and what to do."""


def load_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file, or a resolved config, which is JSON. Raises ConfigError if it cannot be parsed."""
    path = Path(path)
    language, parse = ("JSON", parse_json) if path.suffix == ".json" else ("TOML", parse_toml)
    try:
        with naming(path), path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST_TEXT + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a {language} file: {error}") from None
    if len(text) > _LONGEST_TEXT:
        raise ConfigError(f"{path}: longer than {_LONGEST_TEXT} characters; this is no config")
    try:
        values = parse(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid {language}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, not a table of keys and values")
    return values


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises ValueError for what is no TOML, is nested deeper than JSON may be, or
    holds an integer of more than 64 bits, the largest that TOML knows.
    """
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} tables and lists") from None
    except ValueError as error:  # Python itself refuses to convert thousands of digits
        raise error if isinstance(error, tomllib.TOMLDecodeError) else ValueError(_LONG_INTEGER) from None
    check_depth(values)
    _check_integers(values)
    return values


def _check_integers(value: Any) -> None:
    """Raise ValueError for an integer of more than 64 bits anywhere in a TOML value."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(item, int) and not -(1 << 63) <= item < 1 << 63:
            raise ValueError(_LONG_INTEGER)
        _check_integers(item)


def load_config(model: type[Model], path: str | Path, overrides: Sequence[str] = ()) -> Model:
    """Read `path`, apply overrides such as "optimizer.learning_rate=1e-3" and validate."""
    values = load_toml(path)
    for override in overrides:
        apply_override(values, override)
    return validate(model, values, source=str(path))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set a dotted key in nested tables, in place. The value is TOML; anything else is taken as a string."""
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f'override "{override}": expected key=value, such as optimizer.learning_rate=1e-3')
    try:
        value = parse_toml(f"value = {text.strip()}")["value"]
    except ValueError:
        value = text.strip()
    set_key(values, key, value)


def set_key(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    """Set key `a.b.c` in nested tables, in place; missing tables are made."""
    *parents, last = dotted_key.split(".")
    table = values
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f'override "{dotted_key}": "{parent}" is a value, not a table')
    table[last] = value


def validate(model: type[Model], values: Mapping[str, Any], source: str, table: str = "") -> Model:
    """Make the model, or raise one ConfigError that lists every bad field with the nearest legal key.

    `source` names the file in messages, and `table` the table of the file that `values` come from. A model
    names the keys and values of earlier versions in three class variables. `renamed`: old key -> new key in
    the same table, and "key=old value" -> new value. `moved`: key -> where it is now, from the root of the
    file. `removed`: old key -> what is done instead.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, problem, table) for problem in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def _explain(model: type[BaseModel], problem: Any, table: str) -> str:
    location = [str(part) for part in problem["loc"]]
    field = printable(".".join([table, *location] if table else location)) or "(whole file)"
    here = _model_at(model, location[:-1])
    renamed: Mapping[str, str] = getattr(here, "renamed", {})
    if problem["type"] == "extra_forbidden":
        if location[-1] in renamed:
            return (
                f'{field}: this key is called "{renamed[location[-1]]}" now; its values mean what they meant'
            )
        if (now := getattr(here, "moved", {}).get(location[-1])) is not None:
            return f'{field}: this key has moved to "{now}"; its values mean what they meant'
        removed: Mapping[str, str] = getattr(here, "removed", {})
        if location[-1] in removed:
            return f"{field}: there is no such key any more: {removed[location[-1]]}; take the key out"
        legal = [] if here is None else list(here.model_fields)
        return (
            f"{field}: unknown key{did_you_mean(location[-1], legal)} Legal here: {', '.join(sorted(legal))}"
        )
    message = printable(problem["msg"].removeprefix("Value error, "))
    if problem["type"] == "missing":
        return f"{field}: required, but missing"
    given = problem["input"]
    if location and isinstance(given, str) and (old := f"{location[-1]}={given}") in renamed:
        return f'{field} = "{given}": this value is called "{renamed[old]}" now'
    text = "" if isinstance(given, dict | BaseModel) else f" = {json.dumps(given, default=str)}"
    shown = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
    return f"{field}{shown}: {message}"


def _model_at(model: type[BaseModel], location: Sequence[str]) -> type[BaseModel] | None:
    """The model that `location` leads to from `model`; None where it leads to no model."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[part].annotation if part in current.model_fields else None
        else:  # an element of a list or a table: its value type
            inner = [arg for arg in get_args(current) if arg is not ...]
            current = inner[-1] if inner else None
        if not isinstance(current, type):
            models = [
                arg for arg in get_args(current) if isinstance(arg, type) and issubclass(arg, BaseModel)
            ]
            current = models[0] if models and type(None) in get_args(current) else current
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None
