import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.config import RunConfig
from pretrain.run_dir import RunDir, check_config, check_writable, finished_step
from pretrain.run_files import CONFIG, LOCK, RECORD


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
    _open(_config(tmp_path, data__prefetch_steps=3, keep_checkpoints=7, parallel={"zero_stage": 3}))
    free = json.loads((tmp_path / "tiny" / RECORD).read_text())["attempts"][1]["free_keys"]
    assert free["data.prefetch_steps"] == 3
    assert free["parallel"]["zero_stage"] == 3
    with pytest.raises(ConfigError, match='precision: "fp32" there, "bf16" now'):
        check_config(_config(tmp_path, precision="bf16"))


@pytest.mark.parametrize("name", [CONFIG, RECORD])
def test_an_edited_file_is_named(tmp_path: Path, name: str):
    _open(_config(tmp_path)).close(status="stopped", reason="", exit_code=85, step=0)
    (tmp_path / "tiny" / name).write_text("{")
    with pytest.raises(ConfigError, match=f"{name}: not valid JSON"):
        _open(_config(tmp_path))


HOLD = """
import sys, time
from pathlib import Path
from pretrain.run_dir import _lock
lock = _lock(Path(sys.argv[1]))
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
