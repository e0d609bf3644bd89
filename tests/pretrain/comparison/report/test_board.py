"""The board of TensorBoard: one tag for all runs, equal bytes for equal findings."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.comparison.findings import Findings
from pretrain.comparison.report.board import write_board


def test_a_chart_holds_all_arms(make_findings: Callable[..., Findings], tmp_path: Path) -> None:
    f = make_findings(seeds=(1, 2), until=lambda *_: 60)
    (tmp_path / "board" / "gone_seed1").mkdir(parents=True)
    write_board(f, tmp_path / "board")
    folders = sorted((tmp_path / "board").iterdir())
    assert [folder.name for folder in folders] == ["dense_seed1", "dense_seed2", "mot_seed1", "mot_seed2"]
    for folder, run in zip(folders, sorted(f.results, key=lambda run: run.planned.name), strict=True):
        events = EventAccumulator(str(folder))
        events.Reload()
        scalars = events.Scalars("heldout/loss/image")
        curve = run.curve("eval/loss/image")
        assert [event.step for event in scalars] == [20, 40, 60]
        assert [event.value for event in scalars] == pytest.approx(curve.values, rel=1e-6)  # stored in fp32
        assert [event.wall_time for event in scalars] == pytest.approx(0.101 * curve.steps)
        assert {"heldout/loss", "train/loss/text"} <= set(events.Tags()["scalars"])
    before = [file.read_bytes() for file in sorted((tmp_path / "board").rglob("events*"))]
    write_board(f, tmp_path / "board")
    assert [file.read_bytes() for file in sorted((tmp_path / "board").rglob("events*"))] == before
