import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.config import make_plan
from pretrain.comparison.plan_file import write_plan
from slurm.commands import Queued
from slurm.monitor import state
from slurm.monitor.status import status
from tests.pretrain.conftest import comparison_files  # noqa: F401
from tests.slurm.run_directories import attempt, running, write_run


@pytest.fixture
def in_queue(monkeypatch: pytest.MonkeyPatch) -> dict[str, Queued]:
    """What squeue would list; every question is one of all jobs."""
    listed: dict[str, Queued] = {}
    monkeypatch.setattr(state, "in_queue", lambda names: {n: listed[n] for n in names if n in listed})
    return listed


def told(*paths: Path) -> list[str]:
    out = io.StringIO()
    assert status(paths, to=out) == 0
    return out.getvalue().splitlines()


def test_a_page_of_one_run(tmp_path: Path, in_queue: dict[str, Queued]) -> None:
    in_queue["812"] = Queued("RUNNING", "None", "N/A", "tiny")
    cause = {"kind": "out_of_memory", "rank": 3, "host": "node2", "message": "CUDA"}
    rows = [attempt(exit_code=1, cause=cause, excluded=["node4"]), running(number=1)]
    run = write_run(tmp_path, job={}, attempts=rows, steps=20)
    lines = told(run.run_dir)
    assert lines[0] == f"{run.run_dir}: running, job 812"
    facts = dict(line.strip().split("  ", 1) for line in lines[1:8] if "  " in line.strip())
    assert {name: text.strip() for name, text in facts.items() if name != "goodput"} == {
        "step": "20 of 24 (83 %)",
        "speed": "4,096 tokens/s; 2 s a step with waits and evaluation",
        "loss": "3.2500 nats/token (text 3.0000, image 3.5000) at step 20",
        "left": "8 s",
        "queue wait": "4 min 0 s in all",
        "last stop": "the time limit; requeue 1 of 2",
    }
    text = "\n".join(lines)
    assert (
        "  0  job 812 on node[1-2], steps 0 -> 10, 10 min 0 s, exit code 1, cause: out_of_memory, "
        "nodes found bad: node4: requeued\n     the time limit; requeue 1 of 2\n"
        "  1  job 812 on node[1-2], steps 10 -> ?: running\n"
    ) in text
    assert f"motley logs {run.run_dir}" in text and "goodput: seconds of the steps that" in text


def test_held_out_losses_stand_on_the_page(tmp_path: Path, in_queue: dict[str, Queued]) -> None:
    run = write_run(tmp_path, job={}, attempts=[running()], steps=20)
    assert not any("held-out" in line for line in told(run.run_dir))
    path = run.run_dir / "metrics.jsonl"
    rows = path.read_text().splitlines()
    rows[-2] = json.dumps(json.loads(rows[-2]) | {"eval/loss": 2.0, "eval/loss/text": 2.5})
    path.write_text("\n".join(rows) + "\n")
    assert "  held-out    2.0000 (text 2.5000) nats/token at step 18" in told(run.run_dir)


def test_data_that_a_run_lost_stands_on_its_page_and_in_the_table(
    tmp_path: Path, in_queue: dict[str, Queued]
) -> None:
    run = write_run(tmp_path, job={}, attempts=[running()], steps=20)
    assert not any("documents" in line for line in told(run.run_dir))
    path = run.run_dir / "metrics.jsonl"
    *rows, last = path.read_text().splitlines()
    lost = {"train/spikes": 2, "train/lost_steps": 8, "compute/lost_flops": 1e6, "compute/train_flops": 8e6}
    last = json.dumps(json.loads(last) | {"data/unreadable": 3, "data/too_long": 1200} | lost)
    path.write_text("\n".join([*rows, last]) + "\n")
    assert "  lost steps  spikes: 2, 8 steps lost, 12.5 % of FLOPs" in told(run.run_dir)
    assert "  lost data   documents: 3 unreadable, 1,200 longer than the context" in told(run.run_dir)
    other = write_run(tmp_path, name="other", job={}, attempts=[running()], steps=20)
    line = next(line for line in told(run.run_dir, other.run_dir) if line.startswith("tiny "))
    assert "documents: 3 unreadable, 1,200 longer than the context" in line


def test_a_line_for_each_of_many(tmp_path: Path, in_queue: dict[str, Queued]) -> None:
    in_queue["7"] = Queued("PENDING", "Resources", "N/A", "first")
    first = write_run(tmp_path, name="first", job={"job": 7})
    second = write_run(
        tmp_path, name="second", job={}, attempts=[attempt(next="stopped", reason="b" * 99)], steps=10
    )
    lines = told(first.run_dir, second.run_dir)
    assert lines[1].split()[:7] == ["first", "queued", "7", "0", "24", "0", "%"] and "  Resources" in lines[1]
    cells = lines[2].split()
    assert cells[:9] == ["second", "stopped", "812", "10", "24", "42", "%", "4,096", "3.2500"]
    assert lines[2].endswith("bbb...") and len({line.index(word) for line, word in zip(
        lines[:3], ("why", "Resources", "bbb"), strict=True)}) == 1  # fmt: skip


def test_all_in_runs(tmp_path: Path, in_queue: dict[str, Queued], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no folder runs/ here"):
        status()
    (tmp_path / "runs").mkdir()
    assert told()[0] == "no runs in runs/"
    write_run(tmp_path / "runs", name="a")
    assert told()[0] == "runs/a: never submitted"
    write_run(tmp_path / "runs", name="b", job={}, attempts=[running()], record={"status": "done"})
    (tmp_path / "runs" / "notes").mkdir()
    assert [line.split()[:2] for line in told()[1:3]] == [["a", "never"], ["b", "done"]]


def test_a_comparison_s_table_and_totals(
    comparison_files: Callable[..., Any],  # noqa: F811
    in_queue: dict[str, Queued],
) -> None:
    file = comparison_files().comparison
    plan = make_plan(file, ["comparison.seeds=[1]"])
    write_plan(plan)
    in_queue["812_1"] = Queued("RUNNING", "None", "N/A", "dense_vs_mot")
    attempts = [running(task=1)]
    write_run(plan.directory, name="mot_seed1", job={"task": 1}, attempts=attempts, steps=20)
    lines = told(plan.directory)
    assert lines[0] == str(plan.directory)
    assert lines[2].startswith("dense_seed1  never submitted")
    assert lines[3].split()[:6] == ["mot_seed1", "running", "812_1", "20", "600", "3"]
    assert lines[4] == "2 runs: 1 never submitted, 1 running; 20 of 1,200 steps (2 %)"
    assert lines[5] == "report: not written yet"
    page = plan.directory / "report" / "index.html"
    page.parent.mkdir()
    page.touch()
    assert f"report: {page}" in told(plan.directory)


def test_without_slurm_it_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    runs = [write_run(tmp_path, name=name, job={}, attempts=[running()]).run_dir for name in "ab"]
    lines = told(*runs)
    assert [line.split()[:2] for line in lines[1:3]] == [["a", "running"], ["b", "running"]]
    note = "squeue is not on the PATH: this machine has no Slurm; this is from the records of the runs alone"
    assert lines.count(note) == 1
    never = write_run(tmp_path, name="c").run_dir
    assert "squeue" not in "\n".join(told(never))  # there is nothing to ask


def test_records_forge_no_line(tmp_path: Path, in_queue: dict[str, Queued]) -> None:
    forged = "a\n  state: all is well\x1b[2J\u202e"
    cause = {"kind": forged, "rank": 3, "host": forged, "message": forged}
    rows = [attempt(exit_code=1, cause=cause, nodes=forged, reason=forged, next="stopped", excluded=[forged])]
    run = write_run(tmp_path, job={}, attempts=rows, steps=20, record={"status": forged, "reason": forged})
    assert not in_queue
    for lines in (told(run.run_dir), told(run.run_dir, run.run_dir)):
        assert all(line.isprintable() for line in lines)
        assert not any(line.strip().startswith("state: all is well") for line in lines)
