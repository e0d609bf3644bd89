from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.checkpoint.folder import file_digest
from pretrain.metric_rows import train_row
from pretrain.metrics import METRICS, MetricsLog, add, metric, read_rows
from pretrain.run_identity import RunIdentity
from tests.pretrain.test_metric_rows import step_sums_of
from tests.pretrain.test_tensorboard_view import scalars


def test_every_name_that_is_written_is_in_the_table_once():
    row = train_row(add({}, step_sums_of()), add({}, step_sums_of()), peak_flops=1.0)
    for name in (
        *row,
        "eval/loss/text",
        "eval/loss/text_to_image",
        "eval/gain/image_to_speech",
        "data/epoch",
    ):
        assert metric(name).unit
    assert metric("eval/loss/text").name == "eval/loss/<m>"
    assert metric("eval/loss/text_to_image").name == "eval/loss/<a>_to_<b>"
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for name in ("train/los", "eval/loss/", "train/loss/image/x", "step2"):
        with pytest.raises(KeyError, match=r"METRICS"):
            metric(name)


RUN = RunIdentity("ab12", config_sha256="")


def _open(run_dir: Path, step: int = 0, num_rows: int = 0, **how: Any) -> MetricsLog:
    """The metrics of the run RUN, opened by its first attempt; `how`: other arguments of MetricsLog."""
    arguments = {"run": RUN, "attempt": 0, "sha256": ""} | how
    return MetricsLog(run_dir, step=step, num_rows=num_rows, **arguments)


def test_a_resume_drops_rows_after_its_checkpoint_here_and_in_tensorboard(tmp_path: Path):
    log = _open(tmp_path)
    for step in (2, 4, 6):
        log.write(step, {"train/loss": 10.0 / step, "data/fingerprint": "ab"})
    # No close(): the process was killed, in the middle of a row.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2, 4, 6]

    log = _open(tmp_path, step=5, num_rows=2, attempt=1)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2, 4]
    log.write(6, {"train/loss": 7.5})
    log.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1] == {"step": 6, "run": "ab12", "train/loss": 7.5}
    assert scalars(tmp_path / "tensorboard", "train/loss") == [(2, 5.0), (4, 2.5), (6, 7.5)]


def test_a_log_that_goes_back_drops_rows_that_it_has_written_itself(tmp_path: Path):
    log = _open(tmp_path)
    log.write(2, {"train/loss": 5.0})
    digest = log.sha256
    for step in (4, 6):
        log.write(step, {"train/loss": 10.0 / step})
    with pytest.raises(ConfigError, match="holds 2 rows up to step 5"):
        log.go_back(step=5, num_rows=1, sha256="")
    log.go_back(step=3, num_rows=1, sha256=digest)
    log.write(4, {"train/loss": 7.5})
    log.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2, 4]
    assert log.sha256 == file_digest(tmp_path / "metrics.jsonl")["sha256"]
    assert (log.num_rows, log.train_losses) == (2, [5.0, 7.5])
    assert scalars(tmp_path / "tensorboard", "train/loss") == [(2, 5.0), (4, 7.5)]


def test_a_changed_digit_of_a_row_that_a_checkpoint_counts_on_is_refused(tmp_path: Path):
    log = _open(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": 4.5 / step})
        if step == 2:
            saved = log.sync()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace("4.5", "4.6"))
    with pytest.raises(ConfigError, match=r"holds other rows \(SHA-256 differs\) up to step 2, but"):
        _open(tmp_path, step=2, num_rows=2, sha256=saved)
    assert path.read_text() == whole.replace("4.5", "4.6")
    # What comes after the checkpoint is trained again, so it may be anything that is a row.
    path.write_text(whole.replace("1.5", "1.6"))
    log = _open(tmp_path, step=2, num_rows=2, sha256=saved)
    assert log.sha256 == saved
    log.write(3, {"train/loss": 1.5})
    assert path.read_text() == whole
    assert log.sync() == file_digest(path)["sha256"]


@pytest.mark.parametrize(("change", "theirs"), [('"run": "cd34"', "run id cd34"), ('"x": 1', "no run id")])
def test_rows_of_another_run_are_refused_and_not_dropped(tmp_path: Path, change: str, theirs: str):
    log = _open(tmp_path)
    for step in (1, 2):
        log.write(step, {"train/loss": 1.0})
    text = log.path.read_text().replace('"run": "ab12"', change)
    log.path.write_text(text)
    with pytest.raises(ConfigError, match=f"row of step 1 is one of another run: it has {theirs}, .* ab12"):
        _open(tmp_path)
    assert log.path.read_text() == text
    if theirs == "no run id":
        _open(tmp_path, step=2, num_rows=2, run=RunIdentity("ab12", "", began_without=True))


def test_a_torn_first_row_is_dropped(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"st')
    log = _open(tmp_path)
    log.write(1, {"train/loss": 1.0})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "run": "ab12", "train/loss": 1.0}\n'


@pytest.mark.parametrize("steps", [[], [1, 2, 3]])
def test_rows_that_the_checkpoint_counts_on_may_not_be_missing_or_more(tmp_path: Path, steps: list[int]):
    text = "".join(f'{{"step": {step}, "run": "ab12"}}\n' for step in steps)
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: holds [02] rows up to step 2, .* after 1"):
        _open(tmp_path, step=2, num_rows=1)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_an_edited_row_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\noops\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2: not a row"):
        read_rows(tmp_path / "metrics.jsonl")


def test_nothing_but_finite_numbers_and_known_names_is_written(tmp_path: Path):
    log = _open(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write(1, {"train/loss": float("nan")})
    with pytest.raises(KeyError, match="METRICS"):
        log.write(1, {"train/lost": 1.0})
    assert read_rows(tmp_path / "metrics.jsonl") == []
