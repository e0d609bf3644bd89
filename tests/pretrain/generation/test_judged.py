"""`motley evaluate RUN` on a run that was trained for a few steps over demo-like data."""

import errno
import json
import shutil
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards.synthetic import write_token_folder
from data_pipeline.shards.vocabulary import Vocabulary
from pretrain.metrics import read_rows
from tests.e2e.warm import train
from tests.pretrain.small_judges import judge_in_small
from tests.pretrain.tiny_data import tiny_run, write_tiny_data
from tests.pretrain.tiny_tokenizers import write_demo_like_data, write_tokenized_data
from tests.toml_text import toml_text
from tools.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; a router and experts that choose look at later tokens, so there are two rules."""
    folder = tmp_path_factory.mktemp("judged")
    values = tiny_run(folder / "data", folder / "runs")
    values["model"]["vocab_tokens"] = write_demo_like_data(folder / "data").size
    values["model"]["experts"] = {"text": {"num_experts": 2, "routing": "expert_choice"}}
    values["total_tokens"] = 5 * values["tokens_per_step"]
    (folder / "tiny.toml").write_text(toml_text(values))
    train([str(folder / "tiny.toml")], folder / "out")
    return folder / "runs" / "tiny"


def evaluate(run: Path, *options: Any) -> int:
    return main(["evaluate", str(run), *map(str, options)])


def test_losses_are_those_of_the_runs_own_evaluation(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(run, "--out", tmp_path / "losses.json") == 0
    found, last = json.loads((tmp_path / "losses.json").read_text()), read_rows(run / "metrics.jsonl")[-1]
    assert found["metrics"] == {name: value for name, value in last.items() if name.startswith("eval/")}
    assert found["heldout_fingerprint"] == last["data/heldout_fingerprint"] and found["step"] == 5
    assert f"eval/causal/loss/image {last['eval/causal/loss/image']:.4f}" in capsys.readouterr().out

    # Another folder, of which more is read: one that the run was trained on here.
    other = ("--data", run.parents[1] / "data" / "train", "--conditional", 0, "--sequences", 9)
    assert evaluate(run / "checkpoints" / "step_00000005", *other, "--out", tmp_path / "other.json") == 0
    found = json.loads((tmp_path / "other.json").read_text())
    assert found["data"].endswith("data/train") and "eval/loss" in found["metrics"]
    assert not any("_to_" in name for name in found["metrics"])


def test_facts_stand_beside_the_losses_and_are_those_of_the_seed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge_in_small(monkeypatch)
    found = []
    for name in ("one", "again"):
        out = tmp_path / f"{name}.json"
        assert evaluate(run, "--facts", 4, "--seed", 7, "--out", out) == 0
        found.append(out.read_bytes())
    assert found[0] == found[1]
    metrics = json.loads(found[0])["metrics"]
    assert len([name for name in metrics if name.startswith("eval/facts/")]) == 18
    told = capsys.readouterr().out
    assert "facts, text -> image: exact" in told and "the judge itself: " in told


def test_data_made_by_other_tokenizers_is_refused_and_missing_training_data_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run.parents[1] / "data" / "heldout", tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizers"]["image"]["fingerprint"] = "0123"
    (other / "manifest.json").write_text(json.dumps(manifest))
    (other / "index.bin").unlink(missing_ok=True)
    assert evaluate(run, "--data", other) == 2
    assert "other: its image was made by tokenizer 0123, but the model was" in capsys.readouterr().err
    train = run.parents[1] / "data" / "train"
    train.rename(tmp_path / "away")
    try:
        assert evaluate(run) == 0
        assert f"{train} is not there: whether its tokenizers made the ids" in capsys.readouterr().out
        assert evaluate(run, "--facts", 3) == 2
        assert "no such folder" in capsys.readouterr().err
    finally:
        (tmp_path / "away").rename(train)


MISTAKES = {
    "facts": (("--facts", 1), "--facts 1: 0 (none), or 2 or more"),
    "sequences": (("--sequences", 0), "--sequences 0: 1 or more"),
    "conditional": (("--conditional", -1), "--conditional -1: 0 or more"),
    "temperature": (("--temperature", "nan"), "--temperature nan: 0 (greedy) to 1000"),
    "seed": (("--seed", -1), "--seed -1: a whole number"),
    "choices too": (("--choices", "q.jsonl", "--facts", 3), "leave out --facts, or --choices"),
    "no such folder": (("--data", "nowhere"), '--data = "nowhere": no such folder'),
    "other ids": (("--data", "TINY/heldout"), "its text was made by tokenizer tiny-text"),
    "no speech": (
        ("--data", "SILENT"),
        "holds the modalities text, image, but model.towers names text, image",
    ),
    "no digits": (("--data", "RANDOM/heldout", "--facts", 3), "state digits as the demo corpus does"),
    "tokenizers away": (("--facts", 3, "--tokenizers", "TINY"), "no tokenizers"),
    "out exists": (("--out", "TINY/heldout/manifest.json"), "exists; choose another file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str, run: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = MISTAKES[name]
    folders = {"TINY": others / "tiny", "RANDOM": others, "SILENT": others / "silent"}
    given = [reduce(lambda text, key: text.replace(key, str(folders[key])), folders, str(o)) for o in options]
    out = [] if "--out" in given else ["--out", tmp_path / "out.json"]
    assert evaluate(run, *given, *out) == 2
    # The index of data that is seen for the first time is told before.
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("index ")]
    assert len(lines) == 1 and message in lines[0], lines
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny/: data of another vocabulary; silent/: without speech; heldout/: of the same tokenizers, which
    states no digits."""
    folder = tmp_path_factory.mktemp("others")
    write_tiny_data(folder / "tiny")
    write_tokenized_data(folder)
    silent = Vocabulary(sizes={"text": 24, "image": 16})
    write_token_folder(folder / "silent", [np.array([1, 9, 2])], silent, documents_per_shard=40)
    return folder


def test_weights_and_runs_without_a_checkpoint_are_told_what_they_lack(
    run: Path, speaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(speaker / "weights") == 2
    assert "weights: losses and facts are those of a run or its checkpoint" in capsys.readouterr().err
    begun = Path(shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints")))
    assert evaluate(begun) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_a_full_disk_leaves_no_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_pipeline.files.atomic.os.fsync", full)
    assert evaluate(run, "--conditional", 0, "--out", tmp_path / "out.json") == 2
    assert f"--out {tmp_path / 'out.json'}: cannot be written: No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
