"""Logs become rows of metrics, from CSV files and from run directories."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.foreign.csv_file import COLUMNS
from pretrain.comparison.foreign.logs import Log, RunKey, read_logs
from pretrain.comparison.plan import ComparisonPlan


def logs(tmp_path: Path, lines: Sequence[str], name: str = "runs.csv") -> dict[RunKey, Log]:
    path = tmp_path / name
    path.write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
    return read_logs([path])


def test_lines_of_a_step_are_a_row_and_steps_are_sorted(tmp_path: Path) -> None:
    lines = [
        "dense,1,20,200,text,3.0,5,2e3,9",
        "dense,1,10,100,text,4.0,5,1e3,4",
        "dense,1,20,200,all,3.5,5,2e3,9",
    ]
    ((key, log),) = logs(tmp_path, lines).items()
    assert key == ("dense", 1, 5.0)
    assert log.num_steps == 20 and log.modalities == ("text",) and log.note is None
    first, last = log.rows
    assert first == {"step": 10, "tokens": 100, "compute/train_flops": 1e3, "time/train_s": 4} | {
        "eval/loss/text": 4.0
    }
    assert last["eval/loss"] == 3.5 and last["step"] == 20


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["d,1,10,100,text,3,,,"] * 2, "row 2: d, seed 1, step 10, text is there already, in .*row 1"),
        (["d,1,10,100,text,3,,,", "d,1,10,120,image,3,,,"], "row 2: tokens is 120, and 100 in .*row 1"),
        (["d,1,10,100,text,3,,,", "d,1,10,100,image,3,,5,"], "row 2: flops is 5, and empty in"),
        (
            ["d,1,10,100,text,3,,,", "d,1,20,100,text,3,,,"],
            "row 2: d, seed 1 has 100 tokens at step 20 and 100",
        ),
        (["d,1,10,100,text,3,,5,", "d,1,20,200,text,3,,4,"], "has 4 flops at step 20 and 5 at step 10"),
        (["d,1,10,100,text,3,,,5", "d,1,20,200,text,3,,,"], "row 2: seconds is empty, and not in other rows"),
    ],
)
def test_lines_that_contradict_each_other_are_one_sentence(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        logs(tmp_path, lines)


def test_a_loss_that_is_not_finite_leaves_a_gap_or_ends_the_run(tmp_path: Path) -> None:
    lines = [f"d,{seed},{step},{step}0,text,3,,," for seed in (1, 2) for step in (10, 20, 30)]
    lines[1] = lines[1].replace(",3,,,", ",nan,,,")
    lines[5] = lines[5].replace(",3,,,", ",inf,,,")
    gap, lost = logs(tmp_path, lines).values()
    assert gap.note == "1 losses of seed 1 of d are not finite, and are left out of its curves."
    assert [row.get("eval/loss/text") for row in gap.rows] == [3, None, 3]
    assert lost.record["status"] == "failed" and lost.num_steps == 30 and lost.rows[-1]["step"] == 20
    assert lost.record["attempts"][-1]["reason"] == "its loss (text) is inf at step 30"


def test_a_run_that_is_in_two_logs_and_a_folder_without_a_run_are_refused(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        logs(tmp_path, ["d,1,10,100,text,3,,,"], name)
    with pytest.raises(ConfigError, match=r"b\.csv: seed 1 of d is in .*a\.csv too"):
        read_logs([tmp_path / "a.csv", tmp_path / "b.csv"])
    with pytest.raises(ConfigError, match="a folder without a run: neither it nor a folder in it"):
        read_logs([tmp_path])


def test_run_directories_give_the_losses_that_are_compared(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> None:
    routed = '[arms.routed.model.depth.image]\nschedule = "constant"\nmean_ratio = 0.5\nrule = "top_k"\n'
    plan = synthetic_plan(
        seeds=(3,),
        edit=lambda text: (
            text.replace('vary = ["model.towers"', 'vary = ["model.depth", "model.towers"') + routed
        ),
    )
    write_runs(plan, causal_cost=0.25)
    found = read_logs([plan.directory])
    assert set(found) == {("dense", 3, None), ("mot", 3, None), ("routed", 3, None)}
    for (arm, *_), log in found.items():
        written = plan.run(arm, 3)
        looks_ahead = not written.config.model.is_causal
        assert looks_ahead is (arm == "routed") and log.num_steps == 600
        assert log.modalities == ("text", "image", "speech")
        assert not any(name.startswith("eval/causal") for row in log.rows for name in row)
        assert "data/fingerprint" in log.rows[-1] and "eval/gain/text_to_image" in log.rows[-1]
    same = read_logs([plan.run("dense", 3).config.run_dir])
    assert same == {("dense", 3, None): found["dense", 3, None]}
    key, folder = ("mot", 3, None), plan.run("mot", 3).config.run_dir
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "trunk.jsonl").write_bytes(of_trunk := b"".join(lines[:5]))
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[5:]))
    branch = {"parent": "runs/trunk", "run": "0", "step": 50, "inherited": {}}
    branch["rows_sha256"] = hashlib.sha256(of_trunk).hexdigest()
    (folder / "record.json").write_text(json.dumps({"attempts": [], "branch": branch}))
    log = read_logs([folder])[key]
    assert log.rows == found[key].rows and "mot_seed3 is a branch of runs/trunk at step 50" in str(log.note)
    (folder / "trunk.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"trunk\.jsonl is missing; put the file back"):
        read_logs([folder])
    difference = (
        found["routed", 3, None].rows[-1]["eval/loss/text"] - found["mot", 3, None].rows[-1]["eval/loss/text"]
    )
    assert difference == pytest.approx(0.25, abs=1e-12)  # the causal loss of an arm that looks ahead


def test_parts_of_a_modality_are_no_modalities() -> None:
    names = ("text", "image", "image/time_1", "image/time_4", "text_to_image")
    row = {"step": 1} | {f"eval/loss/{name}": 1.0 for name in names}
    assert Log("a run", (row,), {}, 1).modalities == ("text", "image")
