import signal
import time
from collections.abc import Callable
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


def first_word(hang: Callable[[], str | None], seconds: float) -> str | None:
    deadline = time.monotonic() + seconds
    while (found := hang()) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def write_step(run: Path) -> None:
    (run / "metrics.jsonl").open("a").write("{}\n")


def write_checkpoint(run: Path) -> None:
    folder = run / "checkpoints" / "saving.step_00000005" / "engine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rank_00000").open("a").write("x")


@pytest.mark.parametrize("write", [write_step, write_checkpoint])
def test_silence_is_a_hang_and_writing_is_none(
    folders: tuple[Path, Path, Path], write: Callable[[Path], None]
) -> None:
    _, run, _ = folders
    hang = watch(*folders, hang_after_s=2)
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        write(run)
        assert hang() is None
        time.sleep(0.05)
    assert first_word(hang, 30) == "no log, metrics or checkpoint was written to for 2 s (hang_after_s)"


def test_silence_may_be_left_alone(folders: tuple[Path, Path, Path]) -> None:
    assert first_word(watch(*folders, hang_after_s=0, wait_s=1), 3) is None


@pytest.mark.parametrize("sign", ["record", "srun"])
def test_an_srun_that_stays_after_the_end_of_a_rank(folders: tuple[Path, Path, Path], sign: str) -> None:
    attempt, _, errors = folders
    hang = watch(*folders, hang_after_s=0, wait_s=1)
    if sign == "record":
        (attempt / "rank3.end.json").write_text("{}")
    else:
        errors.write_text("srun: error: node2: task 3: Killed\n")
    assert (
        first_word(hang, 30) == "a rank ended, and srun still waits for others 1 s later: their node is lost"
    )


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
