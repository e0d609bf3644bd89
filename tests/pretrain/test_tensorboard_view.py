import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.tensorboard_view import TensorBoardView


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_after_a_clock_was_set_back_tensorboard_still_shows_all_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = TensorBoardView(tmp_path, attempt=0, purge_from_step=0)
    first.write(1, {"train/loss": 8.0})
    first.close()
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / "events.out.tfevents.2000000000.000000.node1.77")  # as earlier versions named it
    for attempt in range(1, 12):
        monkeypatch.setattr(time, "time", lambda attempt=attempt: 2e9 - 86_400 * attempt)
        view = TensorBoardView(tmp_path, attempt=attempt, purge_from_step=attempt + 1)
        view.write(attempt + 1, {"train/loss": 8.0 - attempt / 2})
        view.write(attempt + 2, {"train/loss": 99.0})  # the next attempt does not continue from here
        view.close()
    assert scalars(tmp_path, "train/loss") == [(1 + n, 8.0 - n / 2) for n in range(12)] + [(13, 99.0)]
