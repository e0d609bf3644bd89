import io
import sys

import pytest

from data_pipeline.files.printable import hidden_characters, printable, printable_output

FORGED = "a\nall is well\r\x1b[2J\x9b1m\u202e\u2066\u2028\ud800\x7f"


def test_what_a_terminal_obeys_is_escaped_and_text_is_not() -> None:
    shown = printable(FORGED)
    assert shown == r"a\nall is well\r\x1b[2J\x9b1m\u202e\u2066\u2028\ud800\x7f"
    assert hidden_characters(shown) == "" and printable(shown) == shown
    for text in (
        "",
        "plain",
        "\u4f60\u597d",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "a\u00a0b",
        "\\n",
    ):
        assert printable(text) == text and hidden_characters(text) == ""
    assert printable("a\tb\n\x1b", keep="\t\n") == "a\tb\n\\x1b"


def test_streams_escape_all_but_lines_tabs_and_a_bar_that_redraws_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sys.stdout, sys.stderr
    with printable_output():
        print("a\tb\x1b[2J\rc")
        sys.stdout.writelines(["\u202e\n"])
        print("\r50 %", end="", file=sys.stderr)
        assert sys.stdout.isatty() == before[0].isatty()
    assert (sys.stdout, sys.stderr) == before
    printed = capsys.readouterr()
    assert printed.out == "a\tb\\x1b[2J\\rc\n\\u202e\n" and printed.err == "\r50 %"


def test_streams_come_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(ValueError), printable_output():
        print("\ud800")
        raise ValueError
    assert sys.stdout is stream and stream.getvalue() == "\\ud800\n"
