"""What ends an attempt from outside, on a real cluster: a preemption, a lost node, a hang, a full disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.launch import child_environment
from pretrain.checkpoint.folder import checkpoints, find_corruption
from tests.e2e.test_train_resume import last_step
from tests.slurm_cluster.cluster import Cluster, environment_of
from tests.slurm_cluster.conftest import REPOSITORY, REQUIRED, Submitted
from tests.slurm_cluster.running import LONG, Make, kill_rank, rank_processes, saved, signal_rank, wait_until

pytestmark = pytest.mark.xdist_group("cluster 3")


def test_a_preempted_job_starts_again(tiny: Make, cluster: Cluster) -> None:
    run = tiny(steps=LONG, eval=LONG, trains=False)
    job = run.start(nodes=1, tasks_per_node=1, partition="low", max_requeues=1)
    wait_until(lambda: last_step(run.run_dir) >= 3, run)
    everything = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.run("sbatch", *everything)
    wait_until(lambda: len(run.ended()) == 1, run)
    (first,) = run.ended()
    assert first["next"] == "requeued" and first["cause"]["kind"] == "preempted", run.text()
    assert first["reason"] == "preempted; stopped by a signal, after a checkpoint; Slurm starts it again"
    wait_until(lambda: last_step(run.run_dir) > first["to_step"] >= 3, run)
    second = run.attempts()[1]
    assert (second["next"], second["from_step"]) == ("running", first["to_step"])
    assert second["submitted"] >= first["started"]
    cluster.run("scancel", str(job))
    run.finish(job)


def test_a_node_that_reboots_is_done_without(tiny: Make, cluster: Cluster) -> None:
    """Other ranks read the same data: tests/e2e/test_train_layouts.py."""
    run = tiny(steps=300, checkpoint=5, eval=300, trains=False)
    job = run.start(nodes=4, min_nodes=1, tasks_per_node=1)
    wait_until(lambda: saved(run) > 0, run)
    lost = cluster.nodes[3]
    try:
        cluster.reboot(lost)
        cluster.run("scontrol", "update", f"NodeName={lost}", "State=DRAIN", "Reason=rebooted")
        ended = run.finish(job)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), run.text()
    finally:
        cluster.run("scontrol", "update", f"NodeName={lost}", "State=RESUME", check=False)
    first, second = run.attempts()
    assert (first["world_size"], first["next"]) == (4, "requeued")
    assert first["reason"].startswith("a lost node; ") and first["reason"].endswith("; Slurm starts it again")
    # Three nodes are left, and four sequences a step are spread over two of them.
    assert (second["world_size"], second["from_step"], second["next"]) == (2, first["to_step"], "done")
    assert second["to_step"] == 300 and "motley: 2 of 3 nodes are used" in run.text()


def test_a_chain_goes_on_in_its_next_job_and_ends_with_the_run(tiny: Make, cluster: Cluster) -> None:
    run = tiny(steps=120, eval=120, trains=False)
    done = run.submit(nodes=1, tasks_per_node=1, max_requeues=0, chain=3)
    assert done.returncode == 0, done.stderr
    first, *followers = map(int, re.findall(r"squeue -j ([\d,]+)", done.stdout)[0].split(","))
    kept = json.loads((run.run_dir / "slurm" / "1" / "job.json").read_text())
    assert (kept["job"], kept["chain"]) == (first, followers) and len(followers) == 2
    again = run.submit()
    assert again.returncode == 2 and "a run has one job at a time" in again.stderr
    wait_until(lambda: last_step(run.run_dir) >= 3, run)
    cluster.run("scancel", "--signal=USR2", str(first))
    assert run.finish(followers[0])["JobState"] == "COMPLETED", run.text()
    one, two = run.attempts()
    assert (one["job"], one["next"], two["job"], two["next"]) == (first, "chained", followers[0], "done")
    assert one["reason"].endswith("; goes on in job 2 of a chain of 3")
    assert 3 <= one["to_step"] == two["from_step"] < two["to_step"] == 120
    assert run.finish(followers[1])["JobState"] == "CANCELLED"
    assert len(run.attempts()) == 2


def test_a_silent_hang_is_ended(tiny: Make, cluster: Cluster) -> None:
    run = tiny(steps=LONG, checkpoint=5, eval=LONG, trains=False, warm=False)
    job = run.start(tasks_per_node=1, hang_after_s=20)
    wait_until(lambda: saved(run) > 0, run)
    signal_rank(job, 0, signal.SIGSTOP)  # the one that writes; of real ranks any, for the others wait for it
    wait_until(lambda: len(run.ended()) == 1, run)
    (first,) = run.ended()
    assert (first["cause"]["kind"], first["next"]) == ("hang", "requeued"), run.text()
    assert "was written to for 20 s (hang_after_s); requeue 1 of 2 at most" in first["reason"]
    wait_until(lambda: len(run.attempts()) == 2, run)
    cluster.run("scancel", str(job))
    run.finish(job)


def test_the_controller_is_away_when_an_attempt_ends(tiny: Make, cluster: Cluster) -> None:
    run = tiny(steps=LONG, checkpoint=5, eval=LONG, trains=False)
    job = run.start(nodes=1, tasks_per_node=1)
    wait_until(lambda: saved(run) > 0, run)
    cluster.stop_controller()
    try:
        kill_rank(job, rank=0)
        wait_until(lambda: not rank_processes(job, 0), run)
    finally:
        cluster.start_controller()
    wait_until(lambda: len(run.attempts()) == 2, run)
    first, second = run.attempts()
    assert (first["next"], first["cause"]["kind"]) == ("requeued", "killed"), run.text()
    assert second["from_step"] == first["to_step"] > 0
    cluster.run("scancel", str(job))
    run.finish(job)


@pytest.fixture
def small_disk(cluster: Cluster) -> Iterator[Path]:
    """A folder of 8 MiB that every node sees."""
    if cluster.small is None:
        pytest.skip("only root may mount a small file system")
    yield cluster.small
    for path in cluster.small.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_full_disk_is_one_message_and_no_loop(tiny: Make, small_disk: Path, tmp_path: Path) -> None:
    run = tiny(steps=LONG, checkpoint=50, eval=LONG)
    run.run_dir = small_disk / "tiny"
    job = run.start(f"runs_dir={small_disk}", nodes=1, tasks_per_node=1)
    wait_until(lambda: saved(run) > 0, run)
    with pytest.raises(OSError), (small_disk / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    ended = run.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), run.text()
    output = (run.run_dir / "slurm" / f"job_{job}.out").read_text()
    assert re.findall(r"^motley: attempt 0, saved steps 0 -> \d+: .*", output, re.MULTILINE), output
    assert "No space left on device" in output and "not started again" in output
    kept = checkpoints(run.run_dir / "checkpoints")
    assert kept and all(find_corruption(path) == [] for _, path in kept)


def test_a_plain_user_submits_and_is_told_what_may_not_be_written(cluster: Cluster, data: Path) -> None:
    """As nobody, who may not run an interpreter below /root: the system's, with the packages of ours."""
    if os.getuid() != 0 or not cluster.namespaces:
        pytest.skip("only root can be another user; these tests run as a plain user already")
    folder = Path(tempfile.mkdtemp(prefix="motley-nobody-", dir="/tmp"))
    try:
        shutil.copytree(data, folder / "data")
        every = {"log": 1, "eval": 24}
        run = Submitted(cluster, folder / "data", folder, steps=24, every_steps=every, warm=False)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
        packages = f"{REPOSITORY}:{sysconfig.get_path('purelib')}"
        environment = environment_of(cluster, child_environment(1)) | {
            "HOME": str(folder),
            "PYTHONPATH": packages,
        }
        become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

        def works(python: str) -> bool:
            check = [*become, "srun", "-Q", python, "-c", "import pydantic, numpy, tools.cli"]
            return subprocess.run(check, env=environment, cwd=folder, capture_output=True).returncode == 0

        python = next(filter(works, (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3")), None)
        if python is None:
            reason = f"no interpreter that nobody may run, with the packages of {packages}"
            assert REQUIRED not in os.environ, reason
            pytest.skip(reason)

        def submit(*arguments: str) -> "subprocess.CompletedProcess[str]":
            command = [*become, python, *run.command(*arguments, nodes=1, tasks_per_node=1)[1:]]
            return subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300
            )

        refused = submit(f"runs_dir={cluster.root / 'etc'}")
        assert refused.returncode == 2 and refused.stdout == ""
        assert re.search(r"motley submit: .*cannot be written: .*Permission denied", refused.stderr)

        done = submit()
        assert done.returncode == 0, done.stderr
        ended = run.finish(int(done.stdout.partition(":")[0].removeprefix("job ")))
        assert (ended["JobState"], ended["UserId"]) == ("COMPLETED", "nobody(65534)"), run.text()
        (attempt,) = run.attempts()
        assert (attempt["next"], attempt["to_step"], attempt["world_size"]) == ("done", 24, 1)
        assert (run.run_dir / "metrics.jsonl").stat().st_uid == 65534
    finally:
        shutil.rmtree(folder, ignore_errors=True)
