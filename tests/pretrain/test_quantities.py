import math

import pytest

from pretrain.quantities import (
    count,
    duration,
    flops,
    format_bytes,
    format_tokens,
    join,
    percent,
    signed,
    with_prefix,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (1234567, "1.23 M"),
        (999_999, "1.00 M"),
        (12.34, "12.3"),
        (1e9, "1.00 G"),
        (math.nan, "n/a"),
    ],
)
def test_prefix(value: float, text: str) -> None:
    assert with_prefix(value) == text


def test_units() -> None:
    assert flops(1.234e15) == "1.23 PFLOP"
    assert format_tokens(6_144_000) == "6.14 M tokens" and format_tokens(2e9) == "2.00 B tokens"
    assert format_tokens(500) == "500 tokens"
    assert count(614_400) == "614,400" and count(37e6) == "37.0 M"
    assert (
        format_bytes(1.5 * 2**30) == "1.50 GiB"
        and format_bytes(2**20) == "1.00 MiB"
        and format_bytes(2048) == "2 KiB"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.4, "59 s"), (59.7, "1 min 0 s"), (95, "1 min 35 s"), (3599.6, "1 h 0 min"), (7265, "2 h 1 min")],
)
def test_duration_never_says_60(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_signs_are_always_there_and_nothing_has_none() -> None:
    assert signed(-0.0564) == "\u22120.056" and signed(0.05) == "+0.050"
    assert signed(-0.0004) == "0.000"
    assert signed(math.nan) == "n/a"


def test_percent_and_join() -> None:
    assert percent(0.625) == "62 %" and percent(0.31415, 1) == "31.4 %" and percent(math.inf) == "n/a"
    assert [join(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
