"""Dotted keys of nested tables, such as "model.towers.image". This module imports no torch."""

from typing import Any


def covers(allowed: str, key: str) -> bool:
    """Whether `key` is the dotted key `allowed` or lies below it."""
    return key == allowed or key.startswith(allowed + ".")


def value_at(values: Any, key: str) -> Any:
    """The value of a dotted key in nested tables. Raises KeyError for a key that is not there."""
    for part in key.split("."):
        values = values[part]
    return values
