"""Dotted keys of nested tables, such as "model.towers.image". This module imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any


def covers(allowed: str, key: str) -> bool:
    """Whether `key` is the dotted key `allowed` or lies below it."""
    return key == allowed or key.startswith(allowed + ".")


def leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a nested table."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def dotted_keys(table: Mapping[str, Any]) -> list[str]:
    """The dotted keys of all values in a nested table."""
    return [key for key, _ in leaves(table)]
