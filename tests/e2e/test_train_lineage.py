"""Extended runs and branches make the curves of runs that were never interrupted, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.folder import checkpoints, read_manifest
from pretrain.lineage.costs import inherited_and_own
from pretrain.metrics import read_rows
from pretrain.run_files import CHECKPOINTS, METRICS, RECORD, TRUNK
from tests.e2e.warm import train
from tests.pretrain.tiny_data import CONTEXT_TOKENS, tiny_run, write_tiny_data
from tests.toml_text import toml_text

STEP_TOKENS = 4 * CONTEXT_TOKENS
MEASURED = ("train/", "eval/", "optim/", "data/", "compute/", "tokens", "step")
INHERITED = ("train/inherited_tokens", "compute/inherited_flops")
WSD = "optimizer.schedule.kind=wsd"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.toml and three runs: `whole`, 30 steps of a wsd schedule; `short`, 20 of them, in
    which the decay begins behind step 16; `trunk`, 20 steps at a constant rate. All have thresholds and an
    average of the weights, which are carried too."""
    folder = tmp_path_factory.mktemp("lineage")
    write_tiny_data(folder / "data")
    values = tiny_run(folder / "data", folder / "runs") | {"keep_checkpoints": 9}
    depth = {"schedule": "constant", "mean_ratio": 0.75, "rule": "threshold"} | {
        "dense_frac": 0,
        "ramp_frac": 0,
    }
    values["model"] |= {"num_layers": 2, "depth": {"image": depth}}
    values["optimizer"] |= {"ema_decay": 0.9}
    values["every_steps"] = {"log": 5, "eval": 5, "eval_conditional": 20, "checkpoint": 5}
    values["evaluate"] = {"heldout_sequences": 4, "conditional_documents": 1}
    (folder / "tiny.toml").write_text(toml_text(values))
    for name, steps, kind in (("whole", 30, "wsd"), ("short", 20, "wsd"), ("trunk", 20, "constant")):
        go(folder, f"name={name}", tokens(steps), f"optimizer.schedule.kind={kind}")
    return folder


def tokens(steps: int) -> str:
    return f"total_tokens={steps * STEP_TOKENS}"


def go(folder: Path, *words: str, run: str = "tiny.toml") -> str:
    """Train to the end; what was said."""
    output = folder / "out"
    output.unlink(missing_ok=True)
    train([str(folder / run), *words], output)
    return output.read_text()


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """All that was measured in the run and its trunk, without times."""
    files = [path for path in (run_dir / TRUNK, run_dir / METRICS) if path.exists()]
    return [
        {name: row[name] for name in row if name.startswith(MEASURED) and name not in INHERITED}
        for path in files
        for row in read_rows(path)
    ]


def weights(run_dir: Path) -> dict[str, Any]:
    """The digests of all weights and optimizer states of the last checkpoint."""
    manifest, problems = read_manifest(checkpoints(run_dir / CHECKPOINTS)[-1][1])
    assert not problems
    return {name: entry["digest"] for name, entry in manifest["tensors"].items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    assert weights(one) == weights(other)


def test_branches_of_a_trunk_are_runs_of_their_lengths(folder: Path) -> None:
    runs = folder / "runs"
    long = ("--branch", "long", "--from-step", "20", tokens(30), WSD)
    said = go(folder, *long, run="runs/trunk")
    identity = json.loads((runs / "trunk" / RECORD).read_text())["run"]["id"]
    assert f"a branch of {runs / 'trunk'} (run {identity}) at step 20" in said
    go(folder, "--branch", "brief", "--from-step", "15", tokens(20), WSD, run="runs/trunk")
    assert_same_run(runs / "long", runs / "whole")
    assert_same_run(runs / "brief", runs / "short")

    branch = json.loads((runs / "long" / RECORD).read_text())["branch"]
    assert (branch["run"], branch["step"], branch["as_without_trunk"]) == (identity, 20, True)
    trunk, (inherited, own) = inherited_and_own(runs / "trunk")[1], inherited_and_own(runs / "long")
    assert inherited == trunk and own.steps == 10 and own.tokens == 10 * STEP_TOKENS
    last = read_rows(runs / "long" / METRICS)[-1]
    assert trunk.flops + own.flops == pytest.approx(last["compute/train_flops"], rel=1e-12)

    shutil.rmtree(runs / "long" / CHECKPOINTS / "step_00000030")
    hidden = (runs / "trunk").rename(runs / "gone")
    assert "whose checkpoint is gone" in go(folder, run="runs/long")  # it needs no trunk any more
    assert_same_run(runs / "long", runs / "whole")
    hidden.rename(runs / "trunk")
    assert "is done: 30 of 30 steps" in go(folder, *long, run="runs/trunk")


def test_a_decayed_run_is_extended_from_before_its_decay(folder: Path) -> None:
    run_dir = Path(shutil.copytree(folder / "runs/short", folder / "moved/short"))
    extended = ("--extend", tokens(30))
    said = go(folder, *extended, run="moved/short")
    assert "extended from 20 to 30 steps; its decay began behind step 16" in said
    assert "goes on after step 15" in said and "checkpoints of steps 20 and later rows" in said
    assert_same_run(run_dir, folder / "runs/whole")
    aside = run_dir / CHECKPOINTS / "aside_1"
    assert [row["step"] for row in read_rows(aside / METRICS)] == [20]
    assert (aside / "step_00000020/manifest.json").exists()
    # Its file and the command that began it continue it, extended as it is.
    shutil.rmtree(run_dir / CHECKPOINTS / "step_00000030")
    plain = ("name=short", f"runs_dir={folder / 'moved'}", tokens(20), WSD)
    assert "it was extended to 30 steps" in go(folder, *plain)
    assert_same_run(run_dir, folder / "runs/whole")
    assert "is done: 30 of 30 steps" in go(folder, *extended, run="moved/short")


def test_a_run_goes_back_and_makes_the_same_steps_again(folder: Path) -> None:
    run_dir = Path(shutil.copytree(folder / "runs/trunk", folder / "moved/trunk"))
    before = curve(run_dir), weights(run_dir)
    said = go(folder, "--from-step", "10", "every_steps.log=10", run="moved/trunk")
    assert f"{run_dir}: back to step 10; checkpoints of steps 15, 20 and later rows" in said
    assert weights(run_dir) == before[1]
    assert [row["step"] for row in curve(run_dir)] == [5, 10, 15, 20]
    assert curve(run_dir)[-1]["eval/loss"] == before[0][-1]["eval/loss"]
    said = go(folder, "--extend", tokens(30), WSD, run="moved/trunk")
    assert "goes on after step 20 as a run of 30 steps would" in said
    assert_same_run(run_dir, folder / "runs/whole")
