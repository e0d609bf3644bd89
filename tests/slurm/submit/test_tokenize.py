"""Tokenizing as Slurm jobs, without a cluster: what is submitted, and what is not submitted again."""

import json
import re
import shlex
from pathlib import Path

import pytest

from data_pipeline.tokenize.prepare import tokenize, tokenize_part
from tests.data_pipeline.raw_documents import CONFIG, write_raw
from tests.slurm.fake_slurm import FakeSlurm
from tools.cli import main

PROFILE = Path(__file__).parents[3] / "slurm" / "profiles" / "test_cluster.toml"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Four shards of text, and a data.toml beside them."""
    write_raw(tmp_path / "raw", shards=4, documents=3)
    (tmp_path / "data.toml").write_text("[text]\nvocab_size = 512\n")
    return tmp_path / "raw"


def words(raw: Path, *more: str) -> list[str]:
    config = raw.parent / "data.toml"
    given = ["tokenize", str(raw), str(raw.parent / "out"), "--config", str(config)]
    return [*given, "--profile", str(PROFILE), *more]


def test_tokenizers_then_parts_then_the_rest(
    raw: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    out = raw.parent / "out"
    assert main(words(raw, "--parts", "3", "--concurrent-parts", "2")) == 0
    first, parts, last = slurm.jobs
    assert [job["job-name"] for job in slurm.jobs] == [
        f"tokenize-out-{step}" for step in ("tokenizers", "parts", "finish")
    ]
    assert "dependency" not in first
    assert (parts["array"], parts["dependency"]) == ("1-3%2", "afterok:17")
    assert last["dependency"] == "afterok:17,afterany:18" and last["kill-on-invalid-dep"] == "yes"
    paths = [shlex.quote(str(path)) for path in (raw, out, raw.parent / "data.toml")]
    command = f"tokenize {paths[0]} {paths[1]} --config {paths[2]} --processes 1"
    for job, ending in ((17, " --tokenizers-only"), (18, " --part $SLURM_ARRAY_TASK_ID/3"), (19, "")):
        assert re.search(rf"{re.escape(command + ending)}(?! --)", slurm.script(job))
    assert (out / "settings.json").exists() and not (out / "tokenizers").exists()
    assert "job 18: parts 1-3%2 of 3\n" in capsys.readouterr().out

    slurm.queue(_19="PENDING tokenize-out-finish")
    assert main(words(raw, "--parts", "3")) == 2
    assert "its job 19 (finish) is PENDING" in capsys.readouterr().err and len(slurm.jobs) == 3


def test_what_is_there_is_not_done_again(
    data: Path, raw: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = raw.parent / "out", raw.parent / "data.toml"
    config.write_text(f'tokenizers_from = "{data}"\n')
    tokenize(raw, out, config_path=config, processes=1, tokenizers_only=True)
    tokenize_part(raw, out, (2, 4), config_path=config, processes=1)
    assert main(words(raw, "--parts", "4")) == 0
    parts, last = slurm.jobs
    assert (parts["array"], last["dependency"]) == ("1,3-4", "afterany:17") and "dependency" not in parts

    for k in (1, 3, 4):
        tokenize_part(raw, out, (k, 4), config_path=config, processes=1)
    assert main(words(raw, "--parts", "4")) == 0
    assert len(slurm.jobs) == 3 and "dependency" not in slurm.jobs[2] and "array" not in slurm.jobs[2]
    tokenize(raw, out, config_path=config, processes=1)
    capsys.readouterr()
    assert main(words(raw, "--parts", "4")) == 0
    assert f"{out} is done" in capsys.readouterr().out and len(slurm.jobs) == 3
    assert [json.loads(path.read_text())["jobs"] for path in sorted(out.glob("slurm/*/job.json"))] == [
        {"parts": 17, "finish": 18},
        {"finish": 19},
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers to take."""
    folder = tmp_path_factory.mktemp("fitted")
    write_raw(folder / "raw", shards=1)
    (folder / "data.toml").write_text(CONFIG)
    tokenize(folder / "raw", folder / "out", config_path=folder / "data.toml", tokenizers_only=True)
    return folder / "out" / "tokenizers"


@pytest.mark.parametrize("accepted", [0, 2])
def test_a_refusal_leaves_nothing_behind(
    raw: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], accepted: int
) -> None:
    slurm.accept(accepted)
    assert main(words(raw, "--parts", "2")) == 2
    assert "sbatch refused the job" in capsys.readouterr().err
    assert slurm.cancelled == ["18", "17"][2 - accepted :] and not (raw.parent / "out").exists()


def test_mistakes_and_a_dry_run(raw: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(raw)) == 2
    assert "--parts N go together" in capsys.readouterr().err
    assert main([*words(raw)[:5], "--parts", "2"]) == 2
    assert main([*words(raw, "--parts", "2"), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("#!/bin/bash\n") == 3
    (raw.parent / "out").mkdir()
    (raw.parent / "out" / "thesis.tex").touch()
    assert main(words(raw, "--parts", "2")) == 2
    assert "holds no token shards" in capsys.readouterr().err
    slurm.remove()
    assert main(words(raw, "--parts", "2")) == 2
    assert "sbatch is not on the PATH" in capsys.readouterr().err and not slurm.folder.exists()
