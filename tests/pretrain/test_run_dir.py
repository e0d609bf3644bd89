import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.checkpoint.folder import file_digest
from pretrain.config import RunConfig
from pretrain.run_dir import CodeState, RunDir, check_config, check_writable, finished_step, read_record
from pretrain.run_files import CONFIG, LOCK, METRICS, RECORD


def _config(runs_dir: Path, **changes) -> RunConfig:
    values = {
        "name": "tiny",
        "total_tokens": 4096,
        "tokens_per_step": 128,
        "runs_dir": str(runs_dir),
        "model": {
            "num_layers": 1,
            "d_model": 32,
            "num_heads": 2,
            "context_tokens": 64,
            "vocab_tokens": 100,
            "towers": {"text": "all", "image": "all"},
        },
        "data": {"train": [{"path": "data/train"}]},
        "optimizer": {"learning_rate": 1e-3},
    }
    for key, value in changes.items():
        table = values
        *parents, last = key.split("__")
        for parent in parents:
            table = table[parent]
        table[last] = value
    return validate(RunConfig, values, source="test")


def _open(config: RunConfig) -> RunDir:
    return RunDir.open(config, world_size=1, command=["motley", "train"])


def test_a_run_directory_tells_who_made_it_and_every_attempt(tmp_path: Path):
    config = _config(tmp_path)
    run = _open(config)
    run.started(0, device="cpu", processor="a CPU", arithmetic="AVX2", initial_weights="ab12")
    run.keep_peak("cpu, fp32, 1 threads", 5e10)
    run.close(status="stopped", reason="SIGTERM", exit_code=85, step=3)
    assert finished_step(config) is None
    run = _open(config)
    run.started(3, device="cpu", processor="a CPU", arithmetic="AVX512", initial_weights=None)
    run.close(status="done", reason="all steps done", exit_code=0, step=32)

    assert finished_step(config) == 32
    assert validate(RunConfig, json.loads((run.path / CONFIG).read_text()), source="saved") == config
    record = json.loads((run.path / RECORD).read_text())
    first, second = record["attempts"]
    assert record["status"] == "done"
    assert (first["initial_weights"], second["initial_weights"]) == ("ab12", None)
    assert record["peak_flops"] == {"cpu, fp32, 1 threads": 5e10}
    assert (first["reason"], first["exit_code"], first["from_step"], first["to_step"]) == (
        "SIGTERM",
        85,
        0,
        3,
    )
    assert (second["reason"], second["exit_code"], second["from_step"]) == ("all steps done", 0, 3)
    assert first["started"] <= first["stopped"] <= second["started"]
    assert first["versions"]["torch"] and first["versions"]["motley"] and first["versions"]["python"]
    assert first["command"] == ["motley", "train"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    if head.returncode == 0:
        assert first["commit"] == head.stdout.strip()


def test_an_attempt_that_was_killed_is_recorded_by_the_next(tmp_path: Path):
    run = _open(_config(tmp_path))
    run._lock.close()  # what the kernel does for a killed process
    _open(_config(tmp_path))
    record = json.loads((run.path / RECORD).read_text())
    assert "killed" in record["attempts"][0]["reason"]
    assert record["status"] == "running"


def test_another_config_is_refused_showing_each_difference(tmp_path: Path):
    _open(_config(tmp_path)).close(status="stopped", reason="", exit_code=85, step=0)
    other = _config(
        tmp_path, total_tokens=8192, model__num_layers=3, model__towers={"text": "t", "image": "i"}
    )
    for check in (check_config, _open):
        with pytest.raises(ConfigError) as error:
            check(other)
        for line in (
            "total_tokens: 4096 there, 8192 now",
            "model.num_layers: 1 there, 3 now",
            'model.towers.image: "all" there, "i" now',
            "name=tiny-2",
        ):
            assert line in str(error.value)
    assert len(json.loads((tmp_path / "tiny" / RECORD).read_text())["attempts"]) == 1


def test_what_does_not_reach_the_numbers_may_change(tmp_path: Path):
    _open(_config(tmp_path)).close(status="stopped", reason="", exit_code=85, step=0)
    changes = {
        "keep_checkpoints": 7,
        "parallel": {"zero_stage": 3},
        "on_spike": "skip",
        "spike": {"window": 9},
    }
    run = _open(_config(tmp_path, data__prefetch_steps=3, **changes))
    free = json.loads((tmp_path / "tiny" / RECORD).read_text())["attempts"][1]["free_keys"]
    assert (free["on_spike"], free["spike"]["window"]) == ("skip", 9)
    run.keep_spikes([], {"train/lost_steps": 0})
    assert "spikes" not in read_record(run.path)
    run.keep_spikes([{"step": 3, "why": "so", "back_to": None}], {"train/lost_steps": 1})
    run.keep_spikes([], {"train/lost_steps": 0})  # a later attempt starts at a checkpoint before the spike
    assert read_record(run.path)["spikes"] == {"events": [], "train/lost_steps": 0}
    assert free["data.prefetch_steps"] == 3
    assert free["parallel"]["zero_stage"] == 3
    with pytest.raises(ConfigError, match='precision: "fp32" there, "bf16" now'):
        check_config(_config(tmp_path, precision="bf16"))


def test_a_run_goes_on_under_another_signature_and_no_message_tells_it(tmp_path: Path):
    def at(place: str, **changes: object) -> RunConfig:
        return _config(tmp_path, data={"train": [{"path": place}], "heldout": place}, **changes)

    _open(at("https://host/a?sig=SECRET1")).close(status="stopped", reason="", exit_code=85, step=0)
    check_config(at("https://host/a?sig=SECRET2"))
    with pytest.raises(ConfigError, match=r"data\.heldout: \"https://host/a\" there, .*host/b") as error:
        check_config(at("https://host/b?sig=SECRET3"))
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "problem"), [(CONFIG, " is not the file that the run began with"), (RECORD, ": not valid JSON")]
)
def test_an_edited_file_is_named(tmp_path: Path, name: str, problem: str):
    _open(_config(tmp_path)).close(status="stopped", reason="", exit_code=85, step=0)
    (tmp_path / "tiny" / name).write_text("{")
    with pytest.raises(ConfigError, match=f"{name}{problem}"):
        _open(_config(tmp_path))


def _record(run: RunDir) -> dict[str, Any]:
    return json.loads((run.path / RECORD).read_text())


def test_what_is_not_committed_is_named_and_its_text_is_kept_on_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code = CodeState("c0de", "+token = 'a secret'", ["pretrain/config.py"])
    monkeypatch.setattr("pretrain.run_dir.code_state", lambda: code)
    run = _open(_config(tmp_path))
    run.close(status="stopped", reason="", exit_code=85, step=0)
    assert "a secret" not in (run.path / RECORD).read_text()
    (attempt,) = _record(run)["attempts"]
    assert (attempt["commit"], attempt["changed_files"]) == ("c0de", ["pretrain/config.py"])
    run = _open(_config(tmp_path, keep_code_diff=True))
    assert _record(run)["diffs"] == {attempt["diff"]: code.diff}
    assert _record(run)["attempts"][1]["diff"] == attempt["diff"] == code.digest


def test_all_attempts_have_the_identity_that_the_first_drew(tmp_path: Path):
    first = _open(_config(tmp_path))
    first.close(status="stopped", reason="", exit_code=85, step=0)
    again, other = _open(_config(tmp_path)), _open(_config(tmp_path, name="other"))
    assert first.identity == again.identity and not again.identity.began_without
    assert first.identity.id != other.identity.id


def test_a_run_of_an_earlier_version_gets_an_identity_and_may_have_files_without_one(tmp_path: Path):
    run = _open(_config(tmp_path))
    run.close(status="stopped", reason="", exit_code=85, step=0)
    older = {key: value for key, value in _record(run).items() if key != "run"} | {"format": 1}
    (run.path / RECORD).write_text(json.dumps(older))
    (run.path / METRICS).write_text('{"step": 1}\n')
    for _ in range(2):
        run = _open(_config(tmp_path))
        assert run.identity.began_without
        run.close(status="stopped", reason="", exit_code=85, step=0)
    assert _record(run)["run"] == run.identity.to_json()


@pytest.mark.parametrize(("missing", "there"), [(CONFIG, RECORD), (CONFIG, METRICS), (RECORD, METRICS)])
def test_a_missing_config_or_record_is_not_made_anew(tmp_path: Path, missing: str, there: str):
    config = _config(tmp_path)
    _open(config).close(status="stopped", reason="", exit_code=85, step=0)
    (config.run_dir / METRICS).write_text('{"step": 1}\n')
    for name in {CONFIG, RECORD, METRICS} - {there}:
        if name == missing or missing == CONFIG:
            (config.run_dir / name).unlink()
    before = sorted(path.name for path in config.run_dir.iterdir())
    for check in (check_config, _open):
        with pytest.raises(ConfigError, match=rf"{missing} is missing, and {there} is there: .*name="):
            check(_config(tmp_path, optimizer={"learning_rate": 3e-3}))
    assert sorted(path.name for path in config.run_dir.iterdir()) == before


def test_killed_between_config_and_record_a_run_begins_anew(tmp_path: Path):
    config = _config(tmp_path)
    _open(config)._lock.close()
    (config.run_dir / RECORD).unlink()
    assert len(_record(_open(config))["attempts"]) == 1


def test_a_config_that_was_changed_together_with_the_run_file_is_refused(tmp_path: Path):
    _open(_config(tmp_path)).close(status="stopped", reason="", exit_code=85, step=0)
    path = tmp_path / "tiny" / CONFIG
    path.write_text(path.read_text().replace('"learning_rate": 0.001', '"learning_rate": 0.002'))
    with pytest.raises(ConfigError, match=rf"{path} is not the file that the run began with: .* {RECORD}"):
        check_config(_config(tmp_path, optimizer={"learning_rate": 2e-3}))


def test_metrics_that_changed_after_the_end_are_refused_and_those_of_a_killed_attempt_are_not(tmp_path: Path):
    config = _config(tmp_path)
    run, rows = _open(config), config.run_dir / METRICS
    rows.write_text('{"step": 1}\n')
    run.seal_rows(1, file_digest(rows)["sha256"])
    run.close(status="stopped", reason="SIGTERM", exit_code=85, step=1)
    check_config(config)
    rows.write_text('{"step": 2}\n')
    for check in (check_config, _open):
        with pytest.raises(ConfigError, match=rf"{rows} is not the file that the run ended with"):
            check(config)
    rows.write_text('{"step": 1}\n')
    _open(config)._lock.close()  # an attempt that is killed after it has written
    rows.write_text('{"step": 1}\n{"step": 2}\n{"st')
    check_config(config)


HOLD = """
import sys, time
from pathlib import Path
from pretrain.run_dir import lock_run
lock = lock_run(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path: Path):
    config = _config(tmp_path)
    _open(config).close(status="stopped", reason="", exit_code=85, step=0)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(config.run_dir)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        for attempt in (check_writable, _open):
            with pytest.raises(ConfigError, match=rf"in use by pid {holder.pid} on .* since .*name="):
                attempt(config)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert f"pid {holder.pid}" in (config.run_dir / LOCK).read_text()  # left behind, and seen to be stale
    check_writable(config)
    _open(config)


def test_a_disk_that_cannot_be_written_is_one_message(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/tiny: cannot be written: .*set runs_dir="):
        _open(_config(tmp_path / "file"))
    assert finished_step(_config(tmp_path / "file")) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "record.json: holds a list, not an object"),
        ('{"status": "done"}', "record.json: attempts: required, but missing"),
        (
            '{"status": "done", "attempts": [3]}',
            r"record.json: attempts\[0\]: holds a whole number, not an object",
        ),
        ('{"status": "done", "attempts": [{"stopped": null}]}', r"attempts\[0\]: to_step: required"),
    ],
)
def test_a_record_that_no_run_writes_is_refused_by_field(tmp_path: Path, content: str, message: str):
    config = _config(tmp_path)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "record.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        finished_step(config)
