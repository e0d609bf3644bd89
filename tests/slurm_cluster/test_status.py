"""`motley status`, `cancel` and `logs` of a job on a real cluster."""

import re
import subprocess

import pytest

from parallel.launch import child_environment
from tests.e2e.test_train_resume import last_step
from tests.slurm_cluster.cluster import Cluster, environment_of
from tests.slurm_cluster.conftest import REPOSITORY
from tests.slurm_cluster.running import LONG, Make, wait_until
from tests.warm_python import executable

pytestmark = pytest.mark.xdist_group("cluster 1")


def test_a_run_is_watched_read_and_cancelled(
    tiny: Make, cluster: Cluster, request: pytest.FixtureRequest
) -> None:
    run = tiny(steps=LONG, eval=LONG)
    environment = environment_of(cluster, child_environment(1))

    def command(verb: str, *words: str) -> list[str]:
        return [executable(), "-m", "tools.cli", verb, str(run.run_file), *words]

    def motley(verb: str, *words: str) -> str:
        done = subprocess.run(
            command(verb, *words),
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout

    assert motley("status").startswith(f"{run.run_dir}: never submitted\n")
    assert motley("cancel") == f"{run.run_dir}: nothing queued or running\n"

    held = run.start(preflight="\n[options]\nhold = true\n")
    assert f"queued, job {held}\n  waits for   JobHeldUser\n" in motley("status")
    assert f"cancelling job {held}: tiny, PENDING\n" in motley("cancel")
    run.finish(held)
    seen = motley("status")
    assert f"cancelled, job {held}\n" in seen and "before it started; the job left no record of it" in seen

    job = run.start(tasks_per_node=1)
    wait_until(lambda: last_step(run.run_dir) >= 3, run)
    seen = motley("status")
    assert f"{run.run_dir}: running, job {job}\n" in seen and f" of {LONG:,} (" in seen, seen
    for fact in (" tokens/s; ", " nats/token (", "goodput  ", "  left  ", f"  0  job {job} on "):
        assert fact in seen, seen
    following = subprocess.Popen(
        command("logs", "-f", "--rank", "1"),
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    request.addfinalizer(following.kill)
    assert "motley: " in motley("logs")  # the job's own output
    (kill_wait,) = re.findall(r"KillWait=(\d+)", cluster.conf.read_text())
    cancelled = motley("cancel")
    assert f"cancelling job {job}: tiny, RUNNING\n" in cancelled and f" {kill_wait} s (KillWait)" in cancelled

    run.finish(job)
    wait_until(lambda: bool(run.attempts()) and run.attempts()[-1]["next"] != "running", run)
    seen = motley("status")
    to_step = run.attempts()[-1]["to_step"]
    assert to_step >= 3 and f"{run.run_dir}: cancelled, job {job}\n" in seen, seen
    assert f"  0  job {job} on {run.attempts()[-1]['nodes']}, steps 0 -> {to_step}, " in seen, seen
    assert motley("cancel") == f"{run.run_dir}: nothing queued or running\n"
    log = run.run_dir / "logs" / f"job_{job}_attempt_0" / "rank1.log"
    followed = following.communicate(timeout=300)[0]  # it ends with the run
    assert following.returncode == 0 and "SIGTERM: saving after this step" in followed, followed
    assert motley("logs", "--rank", "1", "--attempt", "0", "--all") == f"==> {log} <==\n{log.read_text()}"
