import argparse
from pathlib import Path

import pytest

from parallel.testing import run_on_ranks
from tools.bench.checkpoint import main, measure


def _measure(folder: Path) -> str:
    return measure(argparse.Namespace(zero_stage=3, rounds=2, d_model=16, folder=folder))


def test_all_methods_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    text, nothing = run_on_ranks(_measure, 2, tmp_path, timeout_s=300)
    lines = text.splitlines()
    assert nothing == ""
    assert lines[0].startswith("ZeRO-3, 2 ranks, 0.3 M parameters")
    assert [line.split()[0] for line in lines[1:]] == ["ours", "DeepSpeed", "torch", "loading,"]
    assert all("held" in line and "total" in line and "MiB" in line for line in lines[1:4])
    assert "conversion" in lines[2]
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_saves_nothing_of_its_own_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--zero-stage", "0"])
    assert "invalid choice" in capsys.readouterr().err
