"""JSON of unknown origin: its nesting is bounded, so that no reader of the value runs out of stack."""

import json
from typing import Any

MAX_DEPTH = 100
"""Tables and lists inside of each other."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ValueError for what is no JSON, for values nested deeper than MAX_DEPTH and, as `int` does, for
    integers of more than 4,300 digits.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} tables and lists") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise ValueError where tables and lists are nested deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for parent in level for item in _items(parent)]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} tables and lists")


def _items(value: Any) -> list[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return list(items)
