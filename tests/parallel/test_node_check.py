"""Nodes as gloo ranks: what each says of itself, of the others' clocks and of what keeps it from going on."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel import launch, node_check
from parallel.launch import RankFacts
from parallel.node_check import Spec, check
from parallel.testing import run_on_ranks

ALONE = RankFacts(0, 1, 0, "127.0.0.1", 0, None, "single")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    (tmp_path / "check" / "answers").mkdir(parents=True)
    (tmp_path / "check" / "token").write_text("secret")
    return Spec(
        token="secret",
        answers=str(tmp_path / "check" / "answers"),
        gpus=0,
        min_free_gpu_gib=0,
        min_free_disk_gib={"/": 0.0},
        max_clock_skew_s=20.0,
        all_reduce=True,
        timeout_s=300,
    )


def answers(spec: Spec) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(Path(spec.answers).glob("*.json"))]


def _node(spec: Spec, changes: dict[int, dict[str, Any]], ahead_s: dict[int, float]) -> None:
    facts = launch.rank_facts()
    spec = dataclasses.replace(spec, **changes.get(facts.rank, {}))
    check(spec, f"node{facts.rank}", facts, lambda: time.time() + ahead_s.get(facts.rank, 0.0))


def test_nodes_that_are_well_meet_and_sum(spec: Spec) -> None:
    run_on_ranks(_node, 3, spec, {}, {})
    for rank, answer in enumerate(answers(spec)):
        assert (answer["node"], answer["stage"], answer["error"]) == (f"node{rank}", "done", None)
        assert answer["problems"] == answer["shared"] == []
        assert abs(answer["clock_skew_s"]) < 20 and 0 < answer["all_reduce_s"] < answer["seconds"]


def test_a_clock_that_goes_wrong_is_told_by_its_own_node_alone(spec: Spec) -> None:
    run_on_ranks(_node, 3, spec, {}, {1: 100.0, 2: -50.0})
    first, second, third = answers(spec)
    assert first["problems"] == []
    limit = r"20\.0 allowed \(\[preflight\] max_clock_skew_s\)"
    assert re.fullmatch(rf"its clock is (9|10)\d\.\d s ahead of the others', {limit}", second["problems"][0])
    assert re.fullmatch(rf"its clock is (4|5)\d\.\d s behind the others', {limit}", third["problems"][0])
    assert all(answer["stage"] == "done" and answer["all_reduce_s"] for answer in (first, second, third))


def test_nobody_waits_for_a_node_that_has_a_problem(spec: Spec) -> None:
    wanted = {"min_free_disk_gib": {"/nowhere": 1}, "token": "another"}
    run_on_ranks(_node, 3, spec, {2: wanted}, {})
    first, second, third = answers(spec)
    for answer in (first, second, third):
        assert answer["stage"] == "done" and answer["all_reduce_s"] is None
    assert first["problems"] == second["problems"] == []
    unseen, nowhere = third["problems"]
    assert unseen.startswith(f"does not see {Path(spec.answers).parent} as the first node does: ")
    assert nowhere == "/nowhere: No such file or directory; 1 GiB wanted ([preflight] of the profile)"


def test_a_disk_of_the_node_and_one_of_all_are_told_apart(spec: Spec, tmp_path: Path) -> None:
    disks = {"/proc": 20.0, str(tmp_path): 1e9}
    check(dataclasses.replace(spec, min_free_disk_gib=disks, all_reduce=False), "node1", ALONE)
    (answer,) = answers(spec)
    assert answer["problems"] == ["0.0 GiB free under /proc, 20 GiB wanted ([preflight] of the profile)"]
    (line,) = answer["shared"]
    assert re.fullmatch(rf"\d+\.\d GiB free under {tmp_path}, 1e\+09 GiB wanted \(.*", line)


def test_a_node_alone_is_its_own_world(spec: Spec) -> None:
    run_on_ranks(_node, 1, spec, {}, {})
    (answer,) = answers(spec)
    assert (answer["stage"], answer["clock_skew_s"], answer["problems"]) == ("done", 0.0, [])


def _one_stays_away(spec: Spec) -> None:
    if launch.rank_facts().rank == 0:
        _node(spec, {}, {})


def test_who_waits_in_vain_says_so_and_has_no_problem(spec: Spec) -> None:
    run_on_ranks(_one_stays_away, 2, dataclasses.replace(spec, timeout_s=1))
    (answer,) = answers(spec)
    assert (answer["stage"], answer["problems"]) == ("met", [])
    assert "timeout" in answer["error"].lower()


def _one_fails_in_the_sum(spec: Spec) -> None:
    def broken(_values: torch.Tensor) -> None:
        dist.destroy_process_group()
        raise RuntimeError("NCCL error: unhandled system error\nmore")

    if launch.rank_facts().rank == 1:
        dist.all_reduce = broken
    _node(spec, {}, {})


def test_who_fails_has_a_problem_and_who_loses_it_has_none(spec: Spec) -> None:
    run_on_ranks(_one_fails_in_the_sum, 2, spec)
    first, second = answers(spec)
    assert first["stage"] == second["stage"] == "met"
    assert first["problems"] == [] and re.search("clos|reset", first["error"])
    assert second["problems"] == [
        "cannot work with the other nodes: RuntimeError: NCCL error: unhandled system error"
    ]


def _no_sum(spec: Spec) -> None:
    dist.all_reduce = lambda _values: None
    _node(spec, {}, {})


def test_a_wrong_sum_is_seen(spec: Spec) -> None:
    run_on_ranks(_no_sum, 2, spec)
    assert [
        "a sum over the nodes gave 2 to 2, 3 is right" in line for line in answers(spec)[1]["problems"]
    ] == [True]


def test_a_port_in_use_is_a_problem_of_the_node_where_all_meet(spec: Spec) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        check(spec, "node1", RankFacts(0, 2, 0, "127.0.0.1", taken.getsockname()[1], None, "slurm"))
    (answer,) = answers(spec)
    assert answer["stage"] == "local" and answer["error"] is None
    assert re.match(r"cannot work with the other nodes: Dist\w+: .*in use", answer["problems"][0])


def test_gpus_that_are_missing_held_or_broken_are_named(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(index: int) -> tuple[int, int]:
        if index == 5:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be")
        return (12 if index == 3 else 79) << 30, 80 << 30

    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    check(dataclasses.replace(spec, gpus=8, min_free_gpu_gib=70, all_reduce=False), "node1", ALONE)
    assert answers(spec)[0]["problems"] == [
        "7 GPUs visible, 8 wanted",
        "GPU 3: 12.0 GiB free, 70 wanted ([preflight] min_free_gpu_gib): another process holds it",
        "GPU 5: CUDA error: uncorrectable ECC error encountered",
    ]


def process(spec: Spec, code: str = "") -> "subprocess.CompletedProcess[str]":
    file = Path(spec.answers).parent / "spec.json"
    file.write_text(json.dumps(dataclasses.asdict(spec)))
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else ["-m", "parallel.node_check"]), str(file)],
        cwd=REPOSITORY,
        env=launch.child_environment(1) | {"SLURMD_NODENAME": "node7"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_process_that_hangs_ends_and_has_said_how_far_it_came(spec: Spec) -> None:
    token = Path(spec.answers).parent / "token"
    token.unlink()
    os.mkfifo(token)  # a file system that does not answer
    done = process(dataclasses.replace(spec, all_reduce=False, timeout_s=3))
    assert done.returncode == 1 and "in _token" in done.stderr
    (answer,) = answers(spec)
    assert (answer["node"], answer["stage"]) == ("node7", "started")


def test_a_process_that_cannot_answer_says_why_and_fails_nobody(spec: Spec, tmp_path: Path) -> None:
    done = process(dataclasses.replace(spec, answers=str(tmp_path / "check" / "gone"), all_reduce=False))
    assert done.returncode == 0
    assert done.stderr.startswith(f"node7: does not see {tmp_path / 'check'}: the run directory is not on a ")


def test_torch_is_left_alone_where_nothing_needs_it(spec: Spec) -> None:
    code = (
        "import sys; from parallel import node_check as n, launch; from pathlib import Path\n"
        "n.check(n._read(Path(sys.argv[1])), 'node1', launch.rank_facts()); sys.exit('torch' in sys.modules)"
    )
    assert process(dataclasses.replace(spec, all_reduce=False), code).returncode == 0
    assert answers(spec)[0]["stage"] == "done"
    assert process(spec, code).returncode == 1


def test_a_file_that_shows_late_is_waited_for(spec: Spec, tmp_path: Path) -> None:
    late = tmp_path / "late.json"
    with pytest.raises(FileNotFoundError):
        node_check._read(late, patience_s=0)
    (tmp_path / "unfinished").write_text(json.dumps(dataclasses.asdict(spec)))
    threading.Timer(0.7, (tmp_path / "unfinished").rename, (late,)).start()
    assert node_check._read(late) == spec
