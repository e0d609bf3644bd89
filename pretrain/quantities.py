"""Quantities as a person reads them: 6.1 M tokens, 1.2 PFLOP, 3 min 20 s. Pure functions."""

import math
from collections.abc import Sequence

MINUS = "\u2212"
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def with_prefix(value: float, unit: str = "", digits: int = 3, *, short: bool = False) -> str:
    """1234567 -> "1.23 M"; `short` uses B for 10^9, as is usual for parameters and tokens."""
    if not math.isfinite(value):
        return "n/a"
    # The largest prefix whose rounded number is at least 1: 999,999 is 1 M and not 1000 k.
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
    """Whole numbers with thousands separators; large ones with a prefix."""
    return f"{value:,.0f}" if abs(value) < 1e6 else with_prefix(value, short=True)


def format_tokens(value: float) -> str:
    return f"{with_prefix(value, short=True)} tokens".replace("  ", " ")


def flops(value: float) -> str:
    return with_prefix(value, "FLOP")


def format_bytes(value: float) -> str:
    """Binary, as memory is counted: 1.50 GiB."""
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
    return f"{100 * fraction:.{digits}f} %" if math.isfinite(fraction) else "n/a"


def ratio(value: float) -> str:
    """Two decimals; large ones, which intervals from two seeds bring, three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def signed(value: float, digits: int = 3) -> str:
    """With its sign always, and a real minus; what rounds to nothing has none."""
    if not math.isfinite(value):
        return "n/a"
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else MINUS) + text


def join(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
