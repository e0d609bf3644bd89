"""Pure functions that format quantities for people: 6.1 M tokens, 1.2 PFLOP, 3 min 20 s."""

import math
from collections.abc import Sequence

MINUS = "\u2212"
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def with_prefix(value: float, unit: str = "", digits: int = 3, *, short: bool = False) -> str:
    """1234567 -> "1.23 M". `short` writes B for 10^9, as is usual for parameters and tokens."""
    if not math.isfinite(value):
        return "n/a"
    # The prefix is the largest one whose rounded number is at least 1: 999,999 is 1 M and not 1000 k.
    for scale, prefix in _PREFIXES:
        if abs(float(f"{value:.{digits}g}")) >= scale:
            letter = "B" if short and prefix == "G" else prefix
            return f"{_significant(value / scale, digits)} {letter}{unit}"
    return f"{_significant(value, digits)} {unit}".rstrip()


def _significant(value: float, digits: int) -> str:
    text = f"{float(f'{value:.{digits}g}'):.{digits}f}"
    whole = len(text.split(".")[0].lstrip("-"))
    return f"{float(text):.{max(0, digits - whole)}f}"


def count(value: float) -> str:
    """A whole number with thousands separators; from a million on, with a prefix."""
    return f"{value:,.0f}" if abs(value) < 1e6 else with_prefix(value, short=True)


def format_tokens(value: float) -> str:
    """6100000 -> "6.10 M tokens"."""
    return f"{with_prefix(value, short=True)} tokens".replace("  ", " ")


def flops(value: float) -> str:
    """1.2e15 -> "1.20 PFLOP"."""
    return with_prefix(value, "FLOP")


def format_bytes(value: float) -> str:
    """Bytes with a binary prefix, as memory is counted: 1.50 GiB."""
    if not math.isfinite(value):
        return "n/a"
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value / 2**10:.0f} KiB"


def duration(seconds: float) -> str:
    """95 -> "1 min 35 s"; 7200 -> "2 h 0 min"."""
    if not math.isfinite(seconds):
        return "n/a"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def percent(fraction: float, digits: int = 0) -> str:
    """0.25 -> "25 %"."""
    return f"{100 * fraction:.{digits}f} %" if math.isfinite(fraction) else "n/a"


def ratio(value: float) -> str:
    """A ratio with two decimals; from 10 on (the intervals of two seeds are wide) with three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def signed(value: float, digits: int = 3) -> str:
    """A number with + or a typographic minus before it; a number that rounds to 0 has no sign."""
    if not math.isfinite(value):
        return "n/a"
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else MINUS) + text


def join(names: Sequence[str]) -> str:
    """Names as a list in English: "a"; "a and b"; "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
