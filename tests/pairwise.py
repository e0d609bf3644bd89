"""Which rows of a product of parameters to test: few, which hold every pair of values, or every value."""

from collections.abc import Mapping, Sequence
from itertools import combinations

Pair = tuple[tuple[str, str], tuple[str, str]]


def pairwise(rows: Sequence[Mapping[str, str]]) -> list[int]:
    """Indices, ascending, of rows (parameter -> value) that hold every pair of values that any row holds.

    Greedy: of the rows that are left, the one with most pairs that are still missing, the first of equals.
    """
    pairs = [set(combinations(sorted(row.items()), 2)) or {tuple(row.items())} for row in rows]
    missing: set[object] = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return sorted(chosen)


def diagonal(rows: Sequence[Mapping[str, int]]) -> list[int]:
    """Indices, ascending, of rows (parameter -> number of its value) that hold every value of the longest
    parameter once, with the values of the others in turn.
    """
    lengths = {name: 1 + max(row[name] for row in rows) for name in rows[0]}
    longest = max(lengths, key=lambda name: lengths[name])
    return [
        index
        for index, row in enumerate(rows)
        if all(number == row[longest] % lengths[name] for name, number in row.items())
    ]
