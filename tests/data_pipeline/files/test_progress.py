import io

import pytest

from data_pipeline.files.progress import Progress


def test_a_log_gets_plain_lines_and_a_last_one() -> None:
    out = io.StringIO()
    with Progress("tokenize", total=4, unit="shards", log_every_s=0.0, out=out) as progress:
        progress.advance(1, bad=0)
        progress.advance(3, bad=2)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("tokenize: 1/4 shards, bad 0, ")
    assert lines[-1].startswith("tokenize: 4/4 shards, bad 2, ")
    assert "\r" not in out.getvalue()


def test_lines_are_no_more_often_than_asked() -> None:
    out = io.StringIO()
    with Progress("x", total=100, unit="y", log_every_s=3600, out=out) as progress:
        for _ in range(100):
            progress.advance()
    assert out.getvalue().count("\n") == 1


def test_nothing_claims_the_end_after_an_error() -> None:
    out = io.StringIO()
    with pytest.raises(RuntimeError), Progress("x", total=2, unit="y", log_every_s=3600, out=out):
        raise RuntimeError
    assert out.getvalue() == ""


def test_a_terminal_gets_one_live_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress("x", total=2, unit="step", out=out) as progress:
        progress.advance(2, loss=0.123456)
    assert "loss=0.1235" in out.getvalue()
    assert "2/2" in out.getvalue()
