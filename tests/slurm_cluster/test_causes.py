"""A rank that fails ends its job at once, and one line says which, where and why."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.rank_end import rank_ends
from tests.pretrain.tiny_data import write_tiny_data
from tests.slurm_cluster.cluster import Cluster
from tests.slurm_cluster.conftest import Submitted
from tests.slurm_cluster.running import LONG, kill_rank, saved, wait_until

pytestmark = pytest.mark.xdist_group("cluster 1")


def overwrite_shards(run: Submitted, job: int) -> None:
    for shard in (run.folder / "train").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))


def kill_second_rank(run: Submitted, job: int) -> None:
    kill_rank(job, rank=1)


Harm = Callable[[Submitted, int], None]
TOO_MUCH = f"model.ffn_hidden={(1 << 31) - 64}"  # one matrix has some 500 GB, and more is no legal size

CAUSES: dict[str, tuple[list[str], Harm | None, str, int]] = {
    "killed": ([], kill_second_rank, r"rank 1 on NODE: killed: by SIGKILL", 137),
    "data": ([], overwrite_shards, r"rank [01] on NODE: data: ", 2),
    "non_finite": (
        ["optimizer.learning_rate=1e30", "optimizer.schedule.kind=constant"],
        None,
        r"rank 0 on NODE: non finite: step \d+ is not finite: rank 0, micro-batch 0: text loss",
        1,
    ),
    "out_of_memory": ([TOO_MUCH], None, r"rank 0 on NODE: out of memory: .*allocate", 1),
}


@pytest.mark.parametrize("kind", CAUSES)
def test_one_line_says_who_failed_and_why(cluster: Cluster, tmp_path: Path, kind: str) -> None:
    overrides, harm, expected, exit_code = CAUSES[kind]
    write_tiny_data(tmp_path)  # its own: it is harmed
    every = {"log": 1, "eval": LONG, "checkpoint": 5}
    run = Submitted(cluster, tmp_path, tmp_path, steps=LONG, every_steps=every)
    # What a rank does to itself needs no peer.
    job = run.start(*overrides, nodes=2 if harm else 1, tasks_per_node=1, max_requeues=0)
    if harm is not None:
        wait_until(lambda: saved(run) > 0, run)
        harm(run, job)
    ended = run.finish(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", f"{exit_code}:0"), run.text()
    (attempt,) = run.attempts()
    cause = attempt["cause"]
    assert (attempt["exit_code"], cause["kind"]) == (exit_code, kind), run.text()
    assert cause["host"] in cluster.nodes and cause["rank"] in (0, 1)
    sentence = expected.replace("NODE", re.escape(cause["host"]))
    assert re.match(sentence, attempt["reason"]), attempt["reason"]
    output = (run.run_dir / "slurm" / f"job_{job}.out").read_text()
    assert len(re.findall(sentence, output)) == 1, output
    # Nobody waited for the 600 s of a collective: who did not fail lost its peer, or was ended by srun.
    (logs,) = run.run_dir.glob("logs/job_*")
    assert {end["kind"] for end in rank_ends(logs)} <= {kind, "lost_peer", "stopped"}
