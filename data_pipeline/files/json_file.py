"""JSON objects in files, with errors a person can act on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.files.json_text import parse_json
from data_pipeline.files.os_errors import naming
from data_pipeline.files.toml_config import ConfigError

Fields = Mapping[str, type | tuple[type, ...]]
"""Name of a required field -> the types that its value may have."""


def read_object(
    path: Path, fields: Fields | None = None, *, advice: str = "was it edited?"
) -> dict[str, Any]:
    """The JSON object in a file, which holds the `fields`.

    Raises ConfigError, which names file and field and ends with `advice`, and OSError if it cannot be read.
    """
    try:
        with naming(path):
            value = parse_json(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); {advice}") from None
    check_fields(value, fields or {}, where=str(path), advice=advice)
    return value


def check_fields(value: Any, fields: Fields, *, where: str, advice: str) -> None:
    """Raise ConfigError, which begins with `where`, unless `value` is an object that holds the `fields`."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: holds {_kind(value)}, not an object; {advice}")
    for name, types in fields.items():
        if name not in value:
            raise ConfigError(f"{where}: {name}: required, but missing; {advice}")
        if not isinstance(value[name], types) or isinstance(value[name], bool):
            legal = " or ".join(_NAMES[t] for t in (types if isinstance(types, tuple) else (types,)))
            raise ConfigError(f"{where}: {name}: {_kind(value[name])}, should be {legal}; {advice}")


_NAMES: Mapping[type, str] = {
    **{dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"},
    **{bool: "true or false", type(None): "null"},
}


def _kind(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)
