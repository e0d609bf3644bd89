"""A supervisor between an srun and a scontrol that do what a case wants."""

import json
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import validate
from pretrain.config import RunConfig
from slurm.profile import Profile
from slurm.records import append, read_attempts
from slurm.submit.run import write_submission
from slurm.supervise import attempt
from tests.pretrain.tiny_data import tiny_run

JOB = 30_007


class Supervised:
    """A submission of a run of four sequences a step, at step 8, and its job on node1 and node2."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.run_dir, self.calls_file = folder / "runs" / "tiny", folder / "calls"
        self.records = self.run_dir / "slurm"
        self.submission = self.records / "1"
        for path in (self.submission, self.run_dir / "checkpoints" / "step_00000008", folder / "bin"):
            path.mkdir(parents=True)
        self.calls_file.touch()
        self.chain: list[int] = []
        self.environment = {"SLURM_JOB_ID": str(JOB), "SLURM_JOB_NODELIST": "node[1-2]"}
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        monkeypatch.chdir(folder)

    def run(
        self,
        *arguments: str,
        srun: str = ":",
        saves: int = 0,
        job: str = "JobState=RUNNING Reason=None Restarts=0",
        requeue: str = ":",
        given: str = "node1 node2",
        number: int = 0,
        **profile: Any,
    ) -> int:
        """The exit code. `srun`: what ranks do, in bash; `saves`: the step of the checkpoint they leave."""
        log = f'echo "${{0##*/}} $* at $MASTER_ADDR:$MASTER_PORT" >>"{self.calls_file}"'
        saved = f"mkdir -p '{self.run_dir}'/checkpoints/step_{saves:08d}" if saves else ":"
        programs = {
            "srun": f"{log}\n{saved}\n{srun}",
            "scancel": log,
            "scontrol": f"""{log}
case "$*" in
  'show hostnames '*) printf '%s\\n' {given} ;;
  *'show job '*) echo 'JobId=7 {job} SubmitTime=2026-11-22T05:25:04' ;;
  'requeue '*) {requeue} ;;
esac""",
        }
        for name, text in programs.items():
            (self.folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (self.folder / "bin" / name).chmod(0o755)
        values = {"tasks_per_node": 2, "nodes": 2, "time_limit": "1:00:00", "max_requeues": 2}
        values |= {"preflight": {"enabled": False}, **profile}
        run = tiny_run(self.folder, self.folder / "runs") | {"parallel": {"micro_batch_sequences": 1}}
        write_submission(
            self.submission,
            validate(RunConfig, run, source="run"),
            validate(Profile, values, source="profile"),
        )
        ids = {"job": JOB, "task": None, "chain": self.chain, "name": "tiny", "submitted": "2026"}
        (self.submission / "job.json").write_text(json.dumps(ids))
        for name, value in (self.environment | {"SLURM_RESTART_COUNT": str(number)}).items():
            self._monkeypatch.setenv(name, value)
        return attempt.main([str(self.submission), *arguments])

    @property
    def last(self) -> dict[str, Any]:
        return read_attempts(self.records)[-1]

    @property
    def calls(self) -> list[str]:
        """What Slurm was told, without questions."""
        lines = (line.rpartition(" at ")[0] for line in self.calls_file.read_text().splitlines())
        return [line for line in lines if not line.startswith(("srun", "scontrol show", "scontrol -o"))]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervised]:
    before = signal.getsignal(signal.SIGTERM)
    yield Supervised(tmp_path, monkeypatch)
    signal.signal(signal.SIGTERM, before)


def ends(*ranks: str) -> str:
    """srun's words about its tasks, then its end with the last number."""
    return "\n".join(f"echo {shlex.quote(f'srun: error: {rank}')} >&2" for rank in ranks)


STOPPED = f"{ends('node1: tasks 0-3: Exited with exit code 85')}\nexit 85"
KILLED = f"{ends('node2: task 3: Killed', 'node1: tasks 0-2: Terminated')}\nexit 143"


def test_ranks_meet_at_the_first_node(job: Supervised, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run(saves=20, python="python3") == 0
    row = job.last
    assert (row["next"], row["reason"], row["exit_code"]) == ("done", "all steps done", 0)
    assert (row["from_step"], row["to_step"], row["world_size"]) == (8, 20, 4)
    assert row["submitted"] <= row["started"] <= row["ended"]
    logs = job.run_dir / "logs" / f"job_{JOB}_attempt_0"
    (srun,) = (line for line in job.calls_file.read_text().splitlines() if line.startswith("srun "))
    assert srun == (
        f"srun --kill-on-bad-exit=1 --wait=60 --output={logs}/rank%t.log --open-mode=append "
        "--nodes=2 --nodelist=node1,node2 --ntasks=4 --ntasks-per-node=2 --cpus-per-task=1 "
        f"python3 -m pretrain.train {job.submission}/config.json at node1:15007"
    )
    assert "motley: attempt 0, saved steps 8 -> 20: all steps done\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("case", "code", "following", "told"),
    [
        ({"srun": STOPPED, "saves": 12}, 85, "requeued", [f"scontrol requeue {JOB}"]),
        ({"srun": STOPPED}, 85, "stopped", []),
        ({"srun": KILLED, "saves": 12}, 137, "requeued", [f"scontrol requeue {JOB}"]),
        (
            {"srun": STOPPED, "saves": 12, "job": "JobState=COMPLETING Reason=None Restarts=1"},
            *(85, "requeued", []),  # by Slurm itself
        ),
        (
            {"srun": STOPPED, "saves": 12, "job": "JobState=COMPLETING Reason=None Restarts=0"},
            *(85, "ended", []),
        ),
        (
            {"srun": STOPPED, "saves": 12, "requeue": "echo not allowed >&2; exit 1"},
            *(85, "stopped", [f"scontrol requeue {JOB}"]),
        ),
    ],
)
def test_what_comes_next_is_recorded_and_done(
    job: Supervised, case: dict[str, Any], code: int, following: str, told: list[str]
) -> None:
    assert job.run(**case) == code
    assert (job.last["next"], job.last["exit_code"], job.calls) == (following, code, told)
    assert job.last["cause"]["kind"] in ("stopped", "killed")


def test_a_refused_requeue_says_so(job: Supervised) -> None:
    job.run(srun=STOPPED, saves=12, requeue="echo not allowed >&2; exit 1")
    assert job.last["reason"].endswith("; but scontrol requeue: not allowed")


def test_the_cap_counts_failures_and_lost_attempts_but_no_preemption(job: Supervised) -> None:
    past = {"job": JOB, "task": None, "excluded": [], "ended": None, "cause": None, "reason": ""}
    append(job.records, past | {"attempt": 0, "next": "requeued", "cause": {"kind": "preempted"}})
    append(job.records, past | {"attempt": 1, "next": "requeued", "cause": {"kind": "killed"}})
    append(job.records, past | {"attempt": 2, "next": "running"})
    assert job.run(srun=STOPPED, saves=12, number=3, max_requeues=3) == 85
    lost, last = read_attempts(job.records)[2:]
    assert (lost["next"], lost["to_step"]) == ("lost", 8) and "never said how it ended" in lost["reason"]
    assert last["next"] == "requeued" and last["reason"].endswith("requeue 3 of 3 at most")
    assert job.run(srun=STOPPED, saves=16, number=4, max_requeues=3) == 85
    assert job.last["next"] == "stopped"


def test_as_many_nodes_as_the_layout_is_legal_for(
    job: Supervised, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four sequences a step: not on three ranks."""
    sizes = {"nodes": 4, "min_nodes": 1, "tasks_per_node": 1}
    assert job.run(saves=20, given="node1 node2 node4", **sizes) == 0
    assert job.last["world_size"] == 2
    assert "--nodes=2 --nodelist=node1,node2 --ntasks=2 " in job.calls_file.read_text()
    assert "motley: 2 of 3 nodes are used: the layout is legal for no more" in capsys.readouterr().out


def test_setup_that_failed_is_recorded_and_nothing_starts(job: Supervised) -> None:
    assert job.run("--failed", "setup: false failed") == 1
    assert (job.last["next"], job.last["reason"]) == ("stopped", "setup: false failed; not started again")
    assert "srun" not in job.calls_file.read_text() and job.calls == []


def test_bad_nodes_are_excluded_after_the_requeue(job: Supervised) -> None:
    # This srun starts nothing on node2: only node1 answers.
    answer = """
for word; do case $word in *spec.json) answers=${word%/*}/answers ;; esac; done
echo '{"stage": "local", "problems": [], "shared": [], "error": null}' >"$answers"/node1.json
exit 1"""
    options = {"exclude": "node[7-8]"}
    assert job.run(srun=answer, preflight={"enabled": True}, options=options) == 1
    assert job.last["excluded"] == ["node2"] and job.last["next"] == "requeued"
    assert job.last["reason"].startswith("check of nodes: node2: no answer")
    assert job.calls == [
        f"scontrol requeue {JOB}",
        f"scontrol update JobId={JOB} ExcNodeList=node2,node[7-8]",
    ]
    assert job.last["to_step"] == 8
    assert job.run(srun=answer, preflight={"enabled": True, "max_excluded": 0}, number=1) == 1
    assert job.last["next"] == "stopped" and "preflight.max_excluded = 0" in job.last["reason"]


def test_a_chain_hands_on_and_is_over_when_the_run_is(
    job: Supervised, capsys: pytest.CaptureFixture[str]
) -> None:
    job.chain = [JOB + 1, JOB + 2]
    chain = {"max_requeues": 0, "chain": 3}
    assert job.run(srun=STOPPED, saves=12, **chain) == 85
    assert (job.last["next"], job.calls) == ("chained", [])
    job.environment["SLURM_JOB_ID"] = str(JOB + 1)
    assert job.run(saves=20, **chain) == 0
    assert (job.last["next"], job.calls) == ("done", [f"scancel {JOB + 2}"])
    # It had begun before it could be cancelled.
    job.environment["SLURM_JOB_ID"] = str(JOB + 2)
    assert job.run(srun="touch started", **chain) == 0
    assert len(read_attempts(job.records)) == 2 and not (job.folder / "started").exists()
    assert f"nothing to do: job {JOB + 1} of this chain: done: all steps done" in capsys.readouterr().out


def test_attempts_that_were_lost_end_at_the_cap_too_but_not_in_a_chain(job: Supervised) -> None:
    past = {"job": JOB, "task": None, "excluded": [], "ended": None, "cause": None, "reason": ""}
    append(job.records, past | {"attempt": 0, "next": "running"})
    job.environment["SLURM_JOB_ID"] = str(JOB + 1)
    job.chain = [JOB + 1]
    assert job.run(saves=12, max_requeues=0, chain=2) == 0
    assert [row["next"] for row in read_attempts(job.records)] == ["lost", "done"]

    job.environment["SLURM_JOB_ID"], job.chain = str(JOB), []
    append(job.records, past | {"attempt": 1, "next": "running"})
    assert job.run(srun="touch started", number=2, max_requeues=1) == 1
    assert job.last["reason"] == "not started again: it was lost more often than max_requeues"
    assert not (job.folder / "started").exists()


def test_an_element_of_an_array_goes_by_its_own_name(job: Supervised) -> None:
    owner = job.folder / "comparison" / "slurm" / "1"
    owner.mkdir(parents=True)
    (owner / "elements.json").write_text(json.dumps(["nowhere", str(job.submission)]))
    job.run(srun=STOPPED, saves=12)  # writes what was submitted
    job.calls_file.write_text("")
    job.environment |= {"SLURM_ARRAY_JOB_ID": "812", "SLURM_ARRAY_TASK_ID": "1"}
    for name, value in job.environment.items():
        job._monkeypatch.setenv(name, value)
    (job.folder / "bin" / "srun").write_text(
        f"#!/bin/bash\nmkdir -p '{job.run_dir}'/checkpoints/step_00000016\n{STOPPED}\n"
    )
    assert attempt.main([str(owner)]) == 85
    assert (job.last["job"], job.last["task"], job.last["next"]) == (812, 1, "requeued")
    assert job.calls == ["scontrol requeue 812_1"]
    assert (job.run_dir / "logs" / "job_812_1_attempt_0").is_dir()


def test_a_row_that_cannot_be_written_ends_the_job(
    job: Supervised, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shlex.quote(f"{job.records}/attempts.jsonl")
    in_the_way = f"rm {rows}; mkdir {rows}"
    assert job.run(srun=f"{in_the_way}\n{STOPPED}", saves=12) == 85
    assert job.calls == []
    out = capsys.readouterr().out
    assert "saved steps 8 -> 12: " in out and "but not started again: " in out and "Is a directory" in out
    # Nor does one begin.
    assert job.run(srun=f"touch '{job.folder}'/started", number=1) == 1
    assert "Is a directory" in capsys.readouterr().err
    assert not (job.folder / "started").exists()


def test_a_controller_that_is_away_is_waited_for(job: Supervised) -> None:
    away = "[ -e again ] || { touch again; echo Unable to contact slurm controller >&2; exit 1; }"
    assert job.run(srun=STOPPED, saves=12, requeue=away) == 85
    assert job.last["next"] == "requeued" and job.calls == [f"scontrol requeue {JOB}"] * 2


def test_outside_of_a_job(job: Supervised, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempt.main([str(job.submission)]) == 1
    assert "SLURM_JOB_ID is not set" in capsys.readouterr().err
