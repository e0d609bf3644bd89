"""A caveat is a warning that a report gives. This module imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Caveat:
    """A warning about a comparison, as sentences for people."""

    text: str
    grave: bool = False
    """Whether the comparison may not mean what it seems to."""
    rule: str = ""
    """What it is about: a key of RULES (caveats.py)."""
