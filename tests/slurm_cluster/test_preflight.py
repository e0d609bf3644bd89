"""Nodes are looked at before ranks start: one that is not fit is left out, and the job goes on elsewhere."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster.cluster import Cluster
from tests.slurm_cluster.conftest import Submitted
from tests.slurm_cluster.running import wait_until

pytestmark = pytest.mark.xdist_group("cluster 3")
Make = Callable[..., Submitted]


@pytest.fixture
def full_disk(cluster: Cluster) -> Iterator[Path]:
    """A folder that has 1 MiB on the first node, and more on the others."""
    if not cluster.namespaces:
        pytest.skip("nodes without mounts of their own (a plain user's) all see the same disks")
    folder = cluster.root / "scratch"
    folder.mkdir(exist_ok=True)
    slurmd = (cluster.root / "run" / f"slurmd.{cluster.nodes[0]}.pid").read_text().strip()
    inside = ["nsenter", "--target", slurmd, "--mount"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run([*inside, "umount", "--lazy", str(folder)], check=True)


def start(run: Submitted, disk: Path, *lines: str) -> int:
    """Submit to nodes that are all free: Slurm then takes the first two."""
    idle = ["sinfo", "-h", "-N", "-p", "debug", "-o", "%T"]
    wait_until(lambda: set(run.cluster.run(*idle).split()) == {"idle"}, run)
    preflight = "\n".join([f'min_free_disk_gib = {{"{disk}" = 0.01}}', *lines, ""])
    return run.start(preflight=preflight, tasks_per_node=1)


def test_a_node_that_is_not_fit_is_excluded(tiny: Make, cluster: Cluster, full_disk: Path) -> None:
    run = tiny(steps=8, eval=8, trains=False)
    job = start(run, full_disk)
    ended = run.finish(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExcNodeList"]) == ("COMPLETED", "1", "node1"), (
        run.text()
    )
    first, second = run.attempts()
    assert (first["next"], first["excluded"], first["to_step"]) == ("requeued", ["node1"], 0)
    assert first["nodes"] == "node[1-2]"
    assert (
        f"node1: 0.0 GiB free under {full_disk}, 0.01 GiB wanted ([preflight] of the prof" in first["reason"]
    )
    assert not list((run.run_dir / "logs" / f"job_{job}_attempt_0").glob("rank*"))  # none was started
    assert (second["next"], second["excluded"], second["to_step"]) == ("done", [], 8)
    answers = (run.run_dir / "logs" / f"job_{job}_attempt_1" / "preflight" / "answers").glob("*.json")
    looked = [json.loads(path.read_text()) for path in sorted(answers)]
    assert [answer["node"] for answer in looked] == ["node2", "node3"]
    assert all(answer["stage"] == "done" and answer["all_reduce_s"] > 0 for answer in looked)


def test_no_more_nodes_are_excluded_than_the_profile_allows(
    tiny: Make, cluster: Cluster, full_disk: Path
) -> None:
    run = tiny(trains=False)
    job = start(run, full_disk, "max_excluded = 0")
    ended = run.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), run.text()
    (attempt,) = run.attempts()
    assert (attempt["next"], attempt["excluded"]) == ("stopped", ["node1"])
    assert "node1: 0.0 GiB free" in attempt["reason"] and "max_excluded = 0" in attempt["reason"]
