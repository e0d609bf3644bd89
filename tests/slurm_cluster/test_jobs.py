"""`motley submit` on a real cluster: ranks train over gloo on several nodes, are stopped, killed, started."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.launch import child_environment
from pretrain.metrics import read_rows
from slurm.options import LEGAL, OWN_KEY
from tests.e2e.test_train_resume import curve, last_step
from tests.e2e.warm import train
from tests.slurm_cluster.cluster import Cluster, end_orphans, environment_of, running_cluster
from tests.slurm_cluster.conftest import REPOSITORY
from tests.slurm_cluster.running import LONG, Make, kill_rank, saved, wait_until

pytestmark = pytest.mark.xdist_group("cluster 2")


def test_two_nodes_train_to_the_end(tiny: Make, cluster: Cluster) -> None:
    """With interpreters that start as those of a user do."""
    run = tiny(warm=False)
    job = run.start()
    again = run.submit()
    assert again.returncode == 2
    assert re.search(
        rf"motley submit: {run.run_dir} has job {job}, which is (PENDING|RUNNING): ", again.stderr
    )
    ended = run.finish(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), run.text()
    (attempt,) = run.attempts()
    hosts = [host for host in cluster.nodes[:2] for _ in range(2)]
    assert attempt | {"submitted": 0, "started": 0, "ended": 0} == {
        **{"job": job, "task": None, "attempt": 0, "nodes": ended["NodeList"], "world_size": 4},
        **{"submitted": 0, "started": 0, "ended": 0, "from_step": 0, "to_step": 24},
        **{"exit_code": 0, "cause": None, "excluded": [], "next": "done", "reason": "all steps done"},
        "ranks": [
            {"rank": rank, "host": host, "exit_code": 0, "kind": "done"} for rank, host in enumerate(hosts)
        ],
    }
    assert attempt["submitted"] <= attempt["started"] <= attempt["ended"]
    assert ended["NumNodes"] == "2"
    assert [row["step"] for row in read_rows(run.run_dir / "metrics.jsonl")] == list(range(1, 25))
    (logs,) = (run.run_dir / "logs").iterdir()
    assert logs.name == f"job_{job}_attempt_0"
    names = {f"rank{rank}.{kind}" for rank in range(4) for kind in ("log", "end.json")}
    assert {file.name for file in logs.iterdir()} == names | {"srun.log"}
    assert "step 24 of 24 is saved" in (logs / "rank0.log").read_text()
    finished = run.submit()
    assert finished.returncode == 0 and "is done: 24 of 24 steps" in finished.stdout


def test_told_to_stop_it_starts_again_and_nothing_shows(tiny: Make, cluster: Cluster, tmp_path: Path) -> None:
    """SIGUSR2 as ahead of the time limit: to every process of the step, not to the batch shell."""
    run = tiny(steps=120, eval=60)
    waiting = subprocess.Popen(
        run.command("--wait", tasks_per_node=1),
        cwd=REPOSITORY,
        env=environment_of(cluster, child_environment(1)),
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: last_step(run.run_dir) >= 7, run)
    (job_file,) = run.run_dir.glob("slurm/1/job.json")
    job = int(re.findall(r"\d+", job_file.read_text())[0])
    cluster.run("scancel", "--signal=USR2", str(job))
    ended = run.finish(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), run.text()
    first, second = run.attempts()
    assert (first["exit_code"], first["next"], first["from_step"]) == (85, "requeued", 0)
    assert 7 <= first["to_step"] == second["from_step"] < 120
    assert [end["kind"] for end in first["ranks"]] == ["stopped"] * 2
    assert (second["exit_code"], second["next"], second["to_step"]) == (0, "done", 120)
    told = waiting.communicate(timeout=60)[0]
    assert waiting.returncode == 0
    assert f"job {job}, attempt 0: requeued: stopped by a signal, after a checkpoint; requeue 1 of 2" in told
    assert f"job {job}, attempt 1: done: all steps done" in told
    output = (run.run_dir / "slurm" / f"job_{job}.out").read_text()
    assert output.count("from step") == 2  # the second attempt's output came behind the first's

    train([str(run.run_file), "name=undisturbed"], tmp_path / "out", processes=2)
    assert curve(run.run_dir) == curve(tmp_path / "runs" / "undisturbed")


def test_a_crash_loop_stops_at_the_cap_and_says_why(tiny: Make) -> None:
    run = tiny(steps=LONG, checkpoint=5, eval=LONG, trains=False)
    job = run.start(tasks_per_node=1, max_requeues=1)
    for attempt in range(2):
        before = saved(run)
        running = run.run_dir / "logs" / f"job_{job}_attempt_{attempt}"
        wait_until(lambda running=running, before=before: running.exists() and saved(run) > before, run)
        kill_rank(job, rank=1)
        wait_until(lambda attempt=attempt: len(run.ended()) > attempt, run)
    ended = run.finish(job)
    # The code of the rank that was killed, not that of the one that then lost its peer.
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "137:0", "1"), run.text()
    first, second = run.attempts()
    for attempt in (first, second):
        assert attempt["exit_code"] == 137
        assert (attempt["cause"]["rank"], attempt["cause"]["kind"]) == (1, "killed")
        assert re.match(r"rank 1 on \S+: killed: ", attempt["reason"])
    assert first["next"] == "requeued" and first["to_step"] <= second["from_step"] < second["to_step"]
    assert second["next"] == "stopped"
    assert second["reason"].endswith("not started again: the cap of 1 requeues is reached")
    assert second["reason"] in (run.run_dir / "slurm" / f"job_{job}.out").read_text()


def test_a_real_time_limit_then_scancel(tiny: Make, cluster: Cluster) -> None:
    """Slurm looks at limits every 30 s and is up to a minute early: the signal comes after 30 to 60 s. (With
    a limit of a minute it came after 15, when ranks on a loaded machine were still importing.)"""
    run = tiny(steps=LONG, eval=LONG, trains=False)
    job = run.start(nodes=1, tasks_per_node=1, time_limit="2:00", signal_lead_s=30)
    wait_until(lambda: len(run.ended()) == 1, run)
    (first,) = run.attempts()
    assert (first["exit_code"], first["next"]) == (85, "requeued") and first["to_step"] > 0, run.text()
    assert (
        "SIGUSR2: saving after this step"
        in (run.run_dir / "logs" / f"job_{job}_attempt_0" / "rank0.log").read_text()
    )

    wait_until(lambda: last_step(run.run_dir) > first["to_step"], run)
    cluster.run("scancel", str(job))
    ended = run.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "1"), run.text()
    wait_until(lambda: len(run.ended()) == 2, run)
    second = run.attempts()[1]
    assert second["next"] == "ended" and second["reason"].startswith("cancelled; ")
    assert second["exit_code"] == 85 and second["to_step"] == saved(run) > first["to_step"]


def test_slurm_takes_every_script(tiny: Make, cluster: Cluster, tmp_path: Path) -> None:
    run = tiny()
    dry = run.submit("--dry-run")
    assert dry.returncode == 0 and not run.run_dir.exists(), dry.stderr
    script = tmp_path / "job.sbatch"
    script.write_text(dry.stdout)
    assert "to start at" in cluster.run("sbatch", "--test-only", str(script))
    script.write_text(dry.stdout.replace("--nodes=2", "--nodes=5"))
    assert "to start at" not in cluster.run("sbatch", "--test-only", str(script), check=False)

    refused = run.submit(partition="nowhere")
    assert refused.returncode == 2
    assert "motley submit: sbatch refused the job: sbatch: error: invalid partition" in refused.stderr
    assert not list((run.run_dir / "slurm").glob("[0-9]*"))  # nothing half-written stays


def test_every_option_of_sbatch_is_known(cluster: Cluster) -> None:
    offered = set(re.findall(r"--([a-z][a-z-]+)", cluster.run("sbatch", "--help")))
    asking = {"help", "parsable", "quiet", "usage", "verbose", "version", "wait"}
    changing_what_runs = {"array", "gid", "uid", "wrap"}
    assert offered - LEGAL - OWN_KEY.keys() <= asking | changing_what_runs


def test_clusters_do_not_meet(cluster: Cluster) -> None:
    """A second one beside the first, without private namespaces, as a plain user's."""
    show = "scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1; echo $SLURM_JOB_ID"
    with running_cluster(namespaces=False) as other:
        host, job = other.run("srun", "-Q", "-N", "1", "sh", "-c", show).split()
        assert host == other.addresses[0]
        here = cluster.run("srun", "-Q", "-N", "1", "sh", "-c", show).split()
        assert int(here[1]) % 15_000 != int(job) % 15_000 and here[0] == cluster.nodes[0]
        assert len(other.processes()) >= 6  # munged, slurmctld, four slurmd
    assert other.processes() == []


OWNER = """
import time
from tests.slurm_cluster.cluster import running_cluster
with running_cluster() as cluster:
    print(cluster.root, flush=True)
    time.sleep(600)
"""


def test_a_cluster_whose_owner_was_killed_is_ended_by_the_next(cluster: Cluster) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert owner.stdout is not None
    root = Path(owner.stdout.readline().strip())
    owner.kill()
    owner.wait()
    left = Cluster(root, 0, namespaces=False)
    assert left.processes() and root.exists()
    end_orphans()
    assert not left.processes() and not root.exists()
    assert cluster.run("sinfo", "-h")  # the one that has an owner lives
