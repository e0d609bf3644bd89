"""What `motley train` says before it starts anything. The loop itself: tests/e2e/test_train_*.py."""

import errno
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from errno import EROFS
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.faults import ForeignTokenizer, WrongChecksum
from parallel.engine import NothingToLearn
from parallel.exit_codes import ExitCode
from parallel.launch import LaunchError
from parallel.spawn import Ended, spawn
from pretrain.checkpoint.folder import CheckpointError
from pretrain.config import load
from pretrain.run_dir import RunDir
from pretrain.train.finite import NonFiniteError
from pretrain.train.rank import _explain, _why
from pretrain.train.rank import main as rank_main
from pretrain.train.same_batch import BatchMismatch
from pretrain.train.spikes import SpikeError
from tests.pretrain.tiny_data import tiny_run, write_tiny_data
from tests.toml_text import toml_text
from tests.warm_python import executable
from tools.cli import main

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a good run's file, changed by `edit`."""
    write_tiny_data(tmp_path / "data")

    def write(edit: Callable[[dict[str, Any]], Any] = lambda values: None) -> Path:
        values = tiny_run(tmp_path / "data", tmp_path / "runs")
        edit(values)
        path = tmp_path / "run.toml"
        path.write_text(toml_text(values))
        return path

    return write


Edit = Callable[[dict[str, Any]], Any]

MISTAKES: dict[str, tuple[Edit, list[str], list[str]]] = {
    "a key with a typo": (
        lambda values: values["optimizer"].update(learning_rat=1e-3),
        [],
        ["optimizer.learning_rat: unknown key", 'did you mean "learning_rate"'],
    ),
    "an override with a typo": (
        lambda values: None,
        ["model.num_layer=3"],
        ["model.num_layer: unknown key", 'did you mean "num_layers"'],
    ),
    "an override without a value": (
        lambda values: None,
        ["seed"],
        ['override "seed": expected key=value'],
    ),
    "a step that is no number of sequences": (
        lambda values: None,
        ["tokens_per_step=100"],
        ["tokens_per_step = 100 is not a multiple of model.context_tokens = 64"],
    ),
    "data that does not fit": (
        lambda values: values["data"].update(train=[{"path": "nowhere/train"}]),
        [],
        ['data.train[0].path = "nowhere/train": no such folder'],
    ),
    "processes that do not divide the step": (
        lambda values: None,
        ["--processes", "3"],
        ["4 sequences per step cannot be split over dp = 3 ranks"],
    ),
    "no processes": (lambda values: None, ["--processes", "0"], ["--processes 0"]),
    "a disk that cannot be written": (
        lambda values: values.update(runs_dir="/proc/motley"),
        [],
        ["/proc/motley/tiny: cannot be written", "runs_dir="],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_nothing_starts(
    tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], mistake: str
):
    edit, arguments, expected = MISTAKES[mistake]
    assert main(["train", str(write_run(edit)), *arguments]) == 2
    message = capsys.readouterr().err
    for part in expected:
        assert part in message, message
    assert "Traceback" not in message
    assert not (tmp_path / "runs").exists()


def test_a_run_file_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "nowhere.toml"]) == 2
    assert "nowhere.toml: no such file" in capsys.readouterr().err


def test_a_mistake_is_told_without_torch(write_run: Callable[..., Path]):
    path = write_run(lambda values: values["model"].update(vocab_tokens=40))
    code = (
        "import sys\nfrom tools.cli import main\n"
        f"assert main(['train', {str(path)!r}, '--processes', '2']) == 2\n"
        "raise SystemExit(int('torch' in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "usage:"), (["model.vocab_tokens=40"], "set model.vocab_tokens=52")]
)
def test_a_rank_of_another_launcher_checks_too(
    tmp_path: Path, write_run: Callable[..., Path], arguments: list[str], message: str
):
    argv = [str(write_run()), *arguments] if arguments else []
    command = [executable(), "-m", "pretrain.train", *argv]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_broken_launcher_is_one_message(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "0")
    assert main(["train", str(write_run())]) == 2
    assert "RANK or WORLD_SIZE is set, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("x"), ExitCode.USER_ERROR, "x"),
        (LaunchError("x"), ExitCode.USER_ERROR, "x"),
        (CheckpointError("x"), ExitCode.FAILED, "x"),
        (NonFiniteError("x"), ExitCode.FAILED, "x"),
        (SpikeError("x"), ExitCode.FAILED, "x"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/metrics.jsonl"),
            ExitCode.FAILED,
            "a/metrics.jsonl: No space left on device; make room, then the same command goes on",
        ),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "a/record.json"),
            ExitCode.USER_ERROR,
            "a/record.json: Is a directory; a folder stands where a file belongs; move it away",
        ),
        (ValueError("x"), ExitCode.FAILED, None),
        (MemoryError(), ExitCode.FAILED, None),
    ],
)
def test_what_an_error_means(error: Exception, code: int, told: str | None):
    assert _explain(error) == (code, told)


PEER = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6283")


def raised(error: Exception, *, because_of: Exception | None = None, while_at: Exception | None = None):
    error.__context__ = because_of or while_at
    if because_of is not None:
        error.__cause__ = because_of
    return error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConfigError("x"), "user_error", "x"),
        (LaunchError("x"), "user_error", "x"),
        (ForeignTokenizer("x"), "user_error", "x"),
        (WrongChecksum("x"), "data", "x"),
        (BatchMismatch("x"), "data", "x"),
        (NothingToLearn("x"), "data", "x"),
        (NonFiniteError("x"), "non_finite", "x"),
        (SpikeError("x"), "spike", "x"),
        (CheckpointError("x"), "checkpoint", "x"),
        (MemoryError(), "out_of_memory", "MemoryError"),
        (PEER, "lost_peer", str(PEER)),
        (KeyError("x"), "error", "KeyError: 'x'"),
        # as the thread that writes a checkpoint tells it, and as a rank whose own disk it is raises it
        (CheckpointError("y (rank 1): [Errno 28] No space left on device"), "disk", "y (rank 1): [Errno 28]"),
        (raised(CheckpointError("y"), because_of=OSError(EROFS, "x")), "disk", "y"),
        (raised(WrongChecksum("y"), because_of=RuntimeError("x")), "data", "y"),
        (raised(RuntimeError(str(PEER)), while_at=NonFiniteError("x")), "non_finite", "x"),
    ],
)
def test_the_kind_of_an_error_is_that_of_what_happened_first(error: Exception, kind: str, message: str):
    assert _why(error)[0] == kind and _why(error)[1].startswith(message)


LOSES_A_RANK = """
import os, signal, sys, time
from pretrain.train import rank
def train(config, facts, run, stop):
    trains = config.run_dir / "trains"
    while facts.rank == 1:
        if trains.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
    print("step 1", flush=True)
    trains.touch()
    while not stop.requested:
        time.sleep(0.01)
    raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6283")
rank._train = train
rank._kind = lambda error: None  # it would import torch, for seconds
raise SystemExit(rank.main(sys.argv[1:]))
"""


def test_the_rank_that_was_killed_is_named_once_and_everywhere(
    tmp_path: Path,
    write_run: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def ranks_that_train_nothing(argv: Sequence[str], processes: int) -> Ended:
        return spawn(["-c", LOSES_A_RANK, *argv[2:]], processes)  # behind -m pretrain.train

    monkeypatch.setattr("pretrain.train.launch.spawn", ranks_that_train_nothing)
    path = str(write_run())
    assert main(["train", path, "--processes", "2"]) == 128 + signal.SIGKILL
    said = capfd.readouterr()
    (line,) = (line for line in said.err.splitlines() if not line.startswith("index "))
    log = tmp_path / "runs" / "tiny" / "logs" / "rank1.log"
    assert re.fullmatch(
        r"motley train: rank 1 of 2: killed by SIGKILL, perhaps by the kernel for want of memory "
        rf"\(pid \d+\); see {log}",
        line,
    )
    assert said.out == "step 1\n" and "Traceback" in log.with_name("rank0.log").read_text()
    cause = line.removeprefix("motley train: ")
    for verb in ("status", "logs"):
        assert main([verb, path]) == 0
        assert cause in capfd.readouterr().out
    (attempt,) = json.loads((tmp_path / "runs" / "tiny" / "record.json").read_text())["attempts"]
    assert (attempt["reason"], attempt["exit_code"]) == (cause, 137) and attempt["stopped"]


@pytest.mark.parametrize(("change", "kind"), [("seed=x", "user_error"), ("data.train=[]", "user_error")])
def test_a_rank_of_a_slurm_job_leaves_a_record(
    tmp_path: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, change: str, kind: str
):
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    for name, value in (job | {"MOTLEY_ATTEMPT_DIR": str(tmp_path), "SLURMD_NODENAME": "node2"}).items():
        monkeypatch.setenv(name, value)
    assert rank_main([str(write_run()), change]) == ExitCode.USER_ERROR
    record = json.loads((tmp_path / "rank0.end.json").read_text())
    assert (record["rank"], record["host"], record["exit_code"]) == (0, "node2", ExitCode.USER_ERROR)
    assert record["kind"] == kind and change.partition("=")[0] in record["message"]


def test_a_directory_of_another_config_is_refused_before_its_data_is_looked_at(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    path = write_run()
    RunDir.open(load(path), world_size=1, command=[]).close(status="stopped", reason="", exit_code=85, step=0)
    assert main(["train", str(path), "data.heldout=nowhere"]) == 2
    message = capsys.readouterr().err
    assert "was made by another config" in message and '/heldout" there, "nowhere" now' in message
