import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm.supervise.watchdog import run_step, watch


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(attempt's, run's, what srun prints)"""
    attempt = tmp_path / "logs" / "job_7_attempt_0"
    attempt.mkdir(parents=True)
    errors = attempt / "srun.log"
    errors.touch()
    return attempt, tmp_path, errors


@dataclass
class Clock:
    """Time that passes where a test says so."""

    seconds: float = 1e6

    def __call__(self) -> float:
        return self.seconds

    def told(self, hang: Callable[[], str | None], seconds: float) -> tuple[float, str | None]:
        """(seconds from now on, what `hang` says then): the first word of it, asked every half second."""
        began = self.seconds
        while (said := hang()) is None and self.seconds < began + seconds:
            self.seconds += 0.5
        return self.seconds - began, said


@pytest.fixture
def clock() -> Clock:
    return Clock()


def write_step(run: Path) -> None:
    (run / "metrics.jsonl").open("a").write("{}\n")


def write_checkpoint(run: Path) -> None:
    folder = run / "checkpoints" / "saving.step_00000005" / "engine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rank_00000").open("a").write("x")


@pytest.mark.parametrize("write", [write_step, write_checkpoint])
def test_silence_is_a_hang_and_writing_is_none(
    folders: tuple[Path, Path, Path], clock: Clock, write: Callable[[Path], None]
) -> None:
    _, run, _ = folders
    hang = watch(*folders, hang_after_s=600, clock=clock)
    for _ in range(4):
        assert clock.told(hang, 590) == (590, None)
        write(run)
    # A look is made every minute.
    seconds, said = clock.told(hang, 1000)
    assert said == "no log, metrics or checkpoint was written to for 600 s (hang_after_s)"
    assert 600 <= seconds <= 660


def test_silence_may_be_left_alone(folders: tuple[Path, Path, Path], clock: Clock) -> None:
    assert clock.told(watch(*folders, hang_after_s=0, clock=clock), 1e4) == (1e4, None)


@pytest.mark.parametrize("sign", ["record", "srun"])
def test_an_srun_that_stays_after_the_end_of_a_rank(
    folders: tuple[Path, Path, Path], clock: Clock, sign: str
) -> None:
    attempt, _, errors = folders
    hang = watch(*folders, hang_after_s=0, clock=clock)
    assert clock.told(hang, 1000) == (1000, None)
    if sign == "record":
        (attempt / "rank3.end.json").write_text("{}")
    else:
        errors.write_text("srun: error: node2: task 3: Killed\n")
    seconds, said = clock.told(hang, 1000)
    assert said == "a rank ended, and srun still waits for others 90 s later: their node is lost"
    assert 90 < seconds <= 100


def test_a_step_ends_by_itself_or_is_ended(tmp_path: Path) -> None:
    errors = tmp_path / "srun.log"
    ended: list[str] = []

    def run(text: str, hang: str | None) -> tuple[int, str | None]:
        return run_step(
            ["bash", "-c", text],
            environment={"PATH": "/usr/bin:/bin", "SAID": "so"},
            errors=errors,
            hang=lambda: hang,
            end_step=lambda: ended.append("ended") or (tmp_path / "go").touch(),
        )

    assert run("echo $SAID >&2; exit 7", None) == (7, None)
    assert errors.read_text() == "so\n" and ended == []
    assert run("kill -TERM $$", None) == (128 + signal.SIGTERM, None)
    assert run(f"until [ -e {tmp_path}/go ]; do sleep 0.1; done; exit 137", "it hangs") == (137, "it hangs")
    assert ended == ["ended"]
