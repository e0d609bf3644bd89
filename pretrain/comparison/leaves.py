"""The values of nested tables by their dotted keys. This module imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any


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
