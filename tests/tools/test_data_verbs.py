import pytest

from tools.cli import parse


def test_inspect_takes_a_run_or_the_data_of_one() -> None:
    assert parse(["inspect", "runs/x"]).what == ["runs/x"]
    args = parse(["inspect", "data", "runs/x", "--step", "3"])
    assert args.what == ["data", "runs/x"] and (args.step, args.sequences) == (3, 16)


def test_audit_takes_one_run_or_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["audit", "a"]).other is None and parse(["audit", "a", "b"]).other == "b"
    with pytest.raises(SystemExit):
        parse(["audit"])
    assert "the following arguments are required: run" in capsys.readouterr().err
