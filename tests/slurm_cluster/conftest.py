"""One cluster for all tests of a worker, and runs to submit to it.

Tests mostly wait for Slurm. Their files are in three groups that wait about equally long, so that three
clusters may run side by side (tools/test.sh).
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parallel.launch import child_environment
from slurm.records import FOLDER, read_attempts
from tests.pretrain.tiny_data import tiny_run, write_tiny_data
from tests.slurm_cluster.cluster import Cluster, environment_of, missing_programs, running_cluster
from tests.slurm_cluster.untrained import interpreter
from tests.toml_text import toml_text
from tests.warm_python import executable, server, use

REPOSITORY = Path(__file__).parents[2]
PROFILE = REPOSITORY / "slurm" / "profiles" / "test_cluster.toml"
REQUIRED = "MOTLEY_SLURM_REQUIRED"
"""Set by .ci/run: there these tests must not be skipped."""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In the controller of xdist: one server of warm processes for all workers."""
    node.workerinput["warm_python"] = server()


def pytest_configure(config: pytest.Config) -> None:
    if address := getattr(config, "workerinput", {}).get("warm_python"):
        use(address)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if missing := missing_programs():
        reason = f"no Slurm here: {', '.join(missing)} missing; see .ci/run for the packages"
        assert REQUIRED not in os.environ, reason
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return folder


def write_profile(folder: Path, *, preflight: str | None = None, **changes: Any) -> Path:
    """The test cluster's profile with other values at its top level. `preflight`: lines for that table, which
    is the last of the file, and switched on then."""
    text = PROFILE.read_text()
    if preflight is not None:
        text = text.replace("enabled = false", "enabled = true") + preflight
    kept = [line for line in text.splitlines() if line.partition(" = ")[0] not in changes]
    path = folder / "profile.toml"
    path.write_text(toml_text(changes) + "\n".join(kept) + "\n")
    return path


class Submitted:
    """A run's file, `motley submit` as a person types it, and what the job leaves in the run directory."""

    def __init__(
        self,
        cluster: Cluster,
        data: Path,
        folder: Path,
        *,
        steps: int,
        every_steps: Any,
        trains: bool = True,
        warm: bool = True,
    ) -> None:
        """`trains` = False: its ranks are those of tests/slurm_cluster/untrained.py. `warm`: its processes
        are forked with everything imported (tests/warm_python.py), and cannot be stopped by SIGSTOP."""
        self.cluster, self.folder = cluster, folder
        self.python = executable() if warm else sys.executable
        self.profile = {} if trains else {"python": str(interpreter(folder, self.python))}
        self.run_dir = folder / "runs" / "tiny"
        values = tiny_run(data, folder / "runs")
        values["total_tokens"] = steps * values["tokens_per_step"]
        values["every_steps"] = every_steps
        values["parallel"]["micro_batch_sequences"] = 1
        self.run_file = folder / "tiny.toml"
        self.run_file.write_text(toml_text(values))

    def command(self, *arguments: str, **profile: Any) -> list[str]:
        words = [self.python, "-m", "tools.cli", "submit", str(self.run_file), *arguments]
        return [*words, "--profile", str(write_profile(self.folder, **self.profile, **profile))]

    def submit(self, *arguments: str, **profile: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(*arguments, **profile),
            cwd=REPOSITORY,
            # Variables of the user's that would go before the profile, or look like a launcher's.
            env=environment_of(self.cluster, child_environment(1)) | {"SBATCH_PARTITION": "no", "RANK": "7"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def start(self, *arguments: str, **profile: Any) -> int:
        """Submit, which must be accepted; the job's id."""
        done = self.submit(*arguments, **profile)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.partition(":")[0].removeprefix("job "))

    def attempts(self) -> list[dict[str, Any]]:
        return read_attempts(self.run_dir / FOLDER)

    def ended(self) -> list[dict[str, Any]]:
        """Attempts that are over."""
        return [attempt for attempt in self.attempts() if attempt["next"] != "running"]

    def text(self) -> str:
        """All that the job and its ranks printed, for a message."""
        files = [*self.run_dir.glob("slurm/*.out"), *self.run_dir.glob("logs/job_*/**/*")]
        return "\n".join(f"== {file}\n{file.read_text()}" for file in sorted(files) if file.is_file())

    def finish(self, job: int, timeout_s: float = 300.0) -> dict[str, str]:
        """Wait until the job has ended for good; what Slurm then says of it."""

        def ended(seen: dict[str, str]) -> bool:
            state = seen["JobState"]
            attempts = self.attempts()
            requeued = state == "PENDING" or (bool(attempts) and attempts[-1]["next"] == "requeued")
            return state not in {"RUNNING", "COMPLETING", "CONFIGURING"} and not requeued

        with contextlib.suppress(AssertionError):
            return self.cluster.wait_for(job, ended, timeout_s)
        raise AssertionError(f"{self.cluster.job(job)}\n{self.text()}")


@pytest.fixture
def tiny(cluster: Cluster, data: Path, tmp_path: Path) -> Callable[..., Submitted]:
    """Makes a run of 24 steps, logged at each, evaluated and saved now and then."""

    def make(*, steps: int = 24, trains: bool = True, warm: bool = True, **every_steps: int) -> Submitted:
        every = {"log": 1, "eval": 12, "checkpoint": 1000} | every_steps
        return Submitted(cluster, data, tmp_path, steps=steps, every_steps=every, trains=trains, warm=warm)

    return make
