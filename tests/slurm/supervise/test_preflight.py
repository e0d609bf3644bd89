"""What is asked of nodes, and who is blamed for which answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from slurm.profile import PreflightConfig
from slurm.supervise.preflight import problems, write_spec

NODES = ("node1", "node2", "node3")


def config(**values: Any) -> PreflightConfig:
    return validate(PreflightConfig, values, source="site.toml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_free_disk_gib": {"$TMPDIR": 1}}, '"$TMPDIR" is no absolute path'),
        ({"min_free_disk_gib": {"/scratch": -1}}, "greater than or equal to 0"),
        ({"timeout_s": 0}, "timeout_s = 0: Input should be greater than or equal to 10"),
        ({"max_skew": 1}, 'max_skew: unknown key; did you mean "max_clock_skew_s"?'),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(**values)
    assert message in str(error.value)


def test_nodes_are_asked_for_what_the_profile_says_and_always_for_the_run_directory(tmp_path: Path) -> None:
    asked = config(min_free_disk_gib={"/scratch": 20}, timeout_s=60, min_free_gpu_gib=70)
    path = write_spec(asked, gpus=8, run_dir=tmp_path, folder=tmp_path / "logs" / "preflight")
    spec = json.loads(path.read_text())
    assert spec.pop("token") == (path.parent / "token").read_text() != ""
    assert Path(spec.pop("answers")).is_dir()
    assert spec == {
        "gpus": 8,
        "min_free_gpu_gib": 70.0,
        "min_free_disk_gib": {"/scratch": 20.0, str(tmp_path): 1.0},
        "max_clock_skew_s": 5.0,
        "all_reduce": True,
        "timeout_s": 60,
    }


def blamed(folder: Path, *answers: dict[str, Any] | None) -> dict[str, str]:
    """What `problems` makes of an answer a node; None: there is none."""
    (folder / "answers").mkdir()
    nodes = NODES[: len(answers)]
    for node, answer in zip(nodes, answers, strict=True):
        if answer is not None:
            full = {"node": node, "stage": "done", "problems": [], "shared": [], "error": None} | answer
            (folder / "answers" / f"{node}.json").write_text(json.dumps(full))
    return problems(folder, nodes)


FINE: dict[str, Any] = {}
STARTED, LOCAL, MET = ({"stage": stage} for stage in ("started", "local", "met"))
FULL = {"problems": ["0.4 GiB free under /scratch, 20 wanted", "its clock is 9.0 s ahead"]}
HUNG, UNREACHED, NO_SUM = (
    "hung while it checked itself",
    "could not reach the first node",
    "hung or was cut",
)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ((FINE, FINE, FINE), {}),
        # it found something itself: those that then wait for it are not to blame
        ((MET, FULL | LOCAL, None), {"node2": "0.4 GiB free under /scratch, 20 wanted; its clock is 9.0"}),
        ((FULL, FINE, FULL), {"node1": "0.4 GiB", "node3": "0.4 GiB"}),
        # the same everywhere, as of a path that there is not
        ((FULL, FULL), {"": "every node: 0.4 GiB free"}),
        ((FULL,), {"node1": "0.4 GiB free"}),
        # what they share is no node's fault, even if one has a fault too
        (({"shared": ["0.1 GiB free under /runs"]}, FULL), {"": "0.1 GiB free under /runs"}),
        # others wait for these
        ((MET, None, MET), {"node2": "no answer"}),
        ((None, LOCAL, LOCAL), {"node1": "no answer"}),
        ((MET, STARTED, MET), {"node2": HUNG}),
        ((MET, MET, LOCAL), {"node3": UNREACHED}),
        ((FINE, MET, FINE), {"node2": NO_SUM}),
        # nobody reaches the node that all are to meet at
        ((MET, LOCAL, LOCAL), {"node1": "no other node reached it"}),
        ((MET, LOCAL), {"node2": UNREACHED}),
        ((MET, LOCAL, None), {"node2": UNREACHED, "node3": "no answer"}),
        # who is it? Nobody can tell
        ((STARTED, STARTED), {"": f"every node: {HUNG}"}),
        ((None, None), {"": "every node: no answer"}),
        ((None,), {"": "every node: no answer"}),
        ((STARTED,), {"node1": HUNG}),
        ((MET | {"error": "cut off"}, MET), {"": NO_SUM}),
    ],
)
def test_who_is_blamed(tmp_path: Path, answers: tuple[Any, ...], expected: dict[str, str]) -> None:
    found = blamed(tmp_path, *answers)
    assert found.keys() == expected.keys()
    for node, words in expected.items():
        assert words in found[node] and "\n" not in found[node]


def test_errors_of_a_sum_that_nobody_is_blamed_for_are_told(tmp_path: Path) -> None:
    (sentence,) = blamed(tmp_path, MET | {"error": "cut off"}, MET, MET | {"error": "timed out"}).values()
    assert sentence.endswith("; node1: cut off; node3: timed out")


def test_half_an_answer_is_none(tmp_path: Path) -> None:
    blamed(tmp_path, FINE, FINE)
    (tmp_path / "answers" / "node2.json").write_text('{"node": "node2", "sta')
    assert problems(tmp_path, NODES[:2]).keys() == {"node2"}
