"""What became of a fault, from exit codes, from what was printed, and from the results."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IDENTICAL, SAID, SILENT, UGLY = "identical", "said", "SILENT", "UGLY"
_LEGAL_CODES = {1, 2, 85}
_LONGEST_LINES = 24
"""Of a message: a list of differences is one; a dump is none."""


@dataclass(frozen=True)
class Verdict:
    """`outcome`: IDENTICAL (the results are those without the fault), SAID, SILENT or UGLY; and why."""

    outcome: str
    why: str = ""


@dataclass(frozen=True)
class Told:
    """What a verb did: exit codes of its ranks, what it printed, and its results (tests.faults.arena)."""

    codes: Sequence[int]
    text: str
    results: Any


def judge(faulty: Told, good: Told, names: Sequence[str]) -> Verdict:
    """`names`: words of which a message about this fault must hold one."""
    if ugly := ugliness(faulty):
        return Verdict(UGLY, ugly)
    new = [line for line in faulty.text.splitlines() if line not in set(good.text.splitlines())]
    named = next((line for line in new if any(name in line for name in names)), None)
    if any(faulty.codes):
        if named is None:
            return Verdict(UGLY, f"its message names no file: {' / '.join(new[-2:])[:300]}")
        return Verdict(SAID, named[:300])
    if faulty.results == good.results:
        return Verdict(IDENTICAL)
    difference = first_difference(good.results, faulty.results)
    if "caveats" in difference or "broken" in difference:
        return Verdict(SAID, difference[:300])
    if named is not None and re.search(
        r"damaged|passed over|warning|differ|not what|cannot|missing", named, re.I
    ):
        return Verdict(SAID, named[:300])
    return Verdict(SILENT, difference[:300])


def ugliness(told: Told) -> str | None:
    """What a person should never see."""
    if "Traceback (most recent call last)" in told.text:
        return "traceback: " + told.text.strip().splitlines()[-1][:250]
    if -signal.SIGABRT in told.codes:
        return "hang, or abort"
    if wrong := [code for code in told.codes if code and code not in _LEGAL_CODES]:
        return f"exit code {wrong[0]}: {told.text[-200:]}"
    if "\x1b" in told.text:
        return "an escape sequence reached the terminal"
    messages = re.findall(r"^motley .*(?:\n(?!motley).*)*", told.text, re.M)
    if any(told.codes) and messages and messages[-1].count("\n") > _LONGEST_LINES:
        return f"a message of {messages[-1].count(chr(10))} lines"
    return None


def first_difference(good: Any, bad: Any, where: str = "") -> str:
    """The caveats if they differ, else the first place at which two results differ; "" if they are equal."""
    if good == bad:
        return ""
    if isinstance(good, dict) and isinstance(bad, dict):
        keys = sorted(good.keys() | bad.keys(), key=lambda key: (key not in ("caveats", "same_data"), key))
        key = next(key for key in keys if good.get(key) != bad.get(key))
        return first_difference(good.get(key), bad.get(key), f"{where}.{key}")
    if isinstance(good, list) and isinstance(bad, list) and len(good) == len(bad):
        number = next(i for i, (a, b) in enumerate(zip(good, bad, strict=True)) if a != b)
        return first_difference(good[number], bad[number], f"{where}[{number}]")
    return f"results differ at {where.lstrip('.')}: {bad!r:.80} instead of {good!r:.80}"


def words_of(path: Path, root: Path) -> list[str]:
    """Names that a message about `path` may use: the file's, its folder's, its checkpoint's."""
    below = path.relative_to(root)
    words = [below.name.removesuffix(".tmp"), str(path.parent)]
    return words + re.findall(r"step_\d+", str(below))
