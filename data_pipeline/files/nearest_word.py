"""A message about an unknown word names the legal word that is most like it."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, legal: Iterable[str], *, cutoff: float = 0.5, otherwise: str = "") -> str:
    """Return the part of a message that names the legal word most like `word`, or `otherwise` where none is.

    `cutoff`: the least ratio of difflib's SequenceMatcher at which a word counts as alike."""
    near = difflib.get_close_matches(word, list(legal), n=1, cutoff=cutoff)
    return f'; did you mean "{near[0]}"?' if near else otherwise
