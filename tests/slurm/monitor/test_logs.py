import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.config import RunConfig
from slurm.commands import Queued
from slurm.monitor import state
from slurm.monitor.logs import logs
from slurm.records import append
from tests.slurm.run_directories import attempt, running, write_run


@pytest.fixture(autouse=True)
def queue(monkeypatch: pytest.MonkeyPatch) -> dict[str, Queued]:
    """The run's job is running, for as long as the test wants."""
    listed = {"812": Queued("RUNNING", "None", "N/A", "tiny")}
    monkeypatch.setattr(state, "in_queue", lambda names: dict(listed))
    monkeypatch.setattr(state, "final_state", lambda job, names: "COMPLETED")
    return listed


def folder(run: RunConfig, number: int) -> Path:
    found = run.run_dir / "logs" / f"job_812_attempt_{number}"
    found.mkdir(parents=True, exist_ok=True)
    return found


@pytest.fixture
def two_attempts(tmp_path: Path) -> RunConfig:
    run = write_run(tmp_path, job={}, attempts=[attempt(), running(number=1)])
    (run.run_dir / "slurm" / "job_812.out").write_text("both\n")
    for number in (0, 1):
        for file in ("rank0.log", "rank1.log", "srun.log"):
            (folder(run, number) / file).write_text(f"{file} of {number}\n")
    return run


def told(run: RunConfig, **how: Any) -> list[str]:
    out = io.StringIO()
    assert logs(run.run_dir, to=out, **how) == 0
    return [line for line in out.getvalue().splitlines() if not line.startswith("==>")]


def test_the_newest_attempt_a_rank_s_or_another(two_attempts: RunConfig) -> None:
    assert told(two_attempts) == ["both", "rank0.log of 1"]
    assert told(two_attempts, rank=1) == ["rank1.log of 1"]
    assert told(two_attempts, attempt=0) == ["srun.log of 0", "rank0.log of 0"]
    assert told(two_attempts, attempt=0, rank=1) == ["rank1.log of 0"]
    assert told(two_attempts, attempt=0, follow=True) == ["srun.log of 0", "rank0.log of 0"]  # it has ended
    with pytest.raises(ConfigError, match=r"--attempt 2: .* has no such attempt; there are: 0 to 1"):
        told(two_attempts, attempt=2)
    with pytest.raises(ConfigError, match=r"--rank 4: no such rank; the attempt has ranks 0 to 3"):
        told(two_attempts, rank=4)


def test_the_end_of_long_ones_or_all(two_attempts: RunConfig) -> None:
    file = folder(two_attempts, 1) / "rank0.log"
    file.write_text("".join(f"{line}\n" for line in range(1000)))
    assert told(two_attempts, rank=0) == [f"... earlier lines: --all, or {file}", *map(str, range(800, 1000))]
    assert told(two_attempts, rank=0, whole=True) == [*map(str, range(1000))]


def test_before_anything_was_printed(tmp_path: Path, queue: dict[str, Queued]) -> None:
    run = write_run(tmp_path, job={})
    queue["812"] = Queued("PENDING", "Priority", "N/A", "tiny")
    assert told(run) == [
        f"{run.run_dir}: queued, nothing was printed; looked into {run.run_dir / 'slurm' / 'job_812.out'}"
    ]
    never = write_run(tmp_path, name="never")
    assert told(never, follow=True) == [f"{never.run_dir}: never submitted, nothing was printed"]


def test_an_array_s_output_is_the_comparison_s(tmp_path: Path) -> None:
    run = write_run(tmp_path, job={"task": 3}, attempts=[attempt(task=3, next="done")])
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job_812_3.out").write_text("array\n")
    assert told(run) == ["array"]


def test_without_slurm(tmp_path: Path) -> None:
    record = {"attempts": [{"started": "2026-01-01T00:00:00+00:00", "stopped": None, "command": []}]}
    run = write_run(tmp_path, record=record)
    (run.run_dir / "logs").mkdir()
    (run.run_dir / "logs" / "rank0.log").write_text("rank 0\n")
    assert told(run) == ["rank 0"]


class Followed(io.StringIO):
    """What is followed; the test goes on when it sees a text."""

    def __init__(self) -> None:
        super().__init__()
        self.grown = threading.Condition()

    def write(self, text: str) -> int:
        with self.grown:
            self.grown.notify_all()
            return super().write(text)

    def wait_for(self, text: str) -> None:
        with self.grown:
            assert self.grown.wait_for(lambda: text in self.getvalue(), timeout=60), self.getvalue()


def follow(run: RunConfig, **how: Any) -> tuple[Followed, Callable[[], list[str]]]:
    out = Followed()
    thread = threading.Thread(
        target=lambda: logs(run.run_dir, follow=True, to=out, poll_s=0.01, **how), daemon=True
    )
    thread.start()

    def end() -> list[str]:
        thread.join(timeout=60)
        assert not thread.is_alive(), out.getvalue()
        return out.getvalue().splitlines()

    return out, end


def test_following_over_a_requeue_to_the_end(two_attempts: RunConfig) -> None:
    out, end = follow(two_attempts, rank=0)
    out.wait_for("rank0.log of 1\n")
    log = folder(two_attempts, 1) / "rank0.log"
    with log.open("a") as file:
        file.write("more\nhalf a l")
    out.wait_for("more\n")
    with log.open("a") as file:
        file.write("ine\n")
    out.wait_for("half a line\n")

    records = two_attempts.run_dir / "slurm"
    with log.open("a") as file:
        file.write("last words")
    append(records, attempt(number=1))
    append(records, running(number=2))
    out.wait_for("==> attempt 2 begins\n")
    last = folder(two_attempts, 2) / "rank0.log"
    last.write_text("no newline at its end")
    append(records, attempt(number=2, next="done"))
    assert end()[-5:] == [
        "half a line", "last words", "==> attempt 2 begins", f"==> {last} <==", "no newline at its end",
    ]  # fmt: skip


def test_following_ends_with_a_job_that_left_no_word(
    two_attempts: RunConfig, queue: dict[str, Queued]
) -> None:
    out, end = follow(two_attempts)
    out.wait_for("rank0.log of 1\n")
    queue.clear()
    assert end()[-1] == "rank0.log of 1"


def test_logs_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    run = write_run(tmp_path, job={}, attempts=[running()])
    (folder(run, 0) / "rank0.log").write_text("one\x1b[2J\n\ttwo\u202e\n")
    assert told(run) == [r"one\x1b[2J", "\ttwo\\u202e"]
