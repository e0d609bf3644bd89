"""A run that trains from a URL is the run that trains from the folder; killed, it goes on exactly."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.shards.index import TokenSource
from pretrain.audit.report import audit
from pretrain.metrics import read_rows
from tests.data_pipeline.remote.flaky_server import bytes_of, serving
from tests.e2e.warm import Run, train
from tests.pretrain.tiny_data import tiny_run, write_tiny_data
from tests.toml_text import toml_text


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_tiny_data(tmp_path / "data")
    for name in ("train", "heldout"):
        TokenSource.open(tmp_path / "data" / name)
    return tmp_path / "data"


def write_run(folder: Path, name: str, train: str, heldout: str, **changes: Any) -> Path:
    values = tiny_run(folder, folder / "runs") | {"name": name, "total_tokens": 10 * 4 * 64}
    values["data"] = {"train": [{"path": train}], "heldout": heldout, **changes}
    path = folder / f"{name}.toml"
    path.write_text(toml_text(values))
    return path


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    kept = ("step", "loss/", "eval/", "data/fingerprint", "data/heldout", "data/epoch")
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name.startswith(kept)} for row in rows]


def test_a_run_from_a_url_is_the_run_from_the_folder(data: Path, tmp_path: Path) -> None:
    """Its source is dead at first, and fails at random later; the run is killed in between."""
    train([str(write_run(tmp_path, "local", str(data / "train"), str(data / "heldout")))], tmp_path / "local")
    cache, run_dir = tmp_path / "cache", tmp_path / "runs/remote"
    with serving(data, seed=2, fault_frac=1.0, faults=("500",)) as server:
        server.failing = "/train/tokens"
        places = (f"{server.url}/train", f"{server.url}/heldout?sig=SECRET")
        path = str(write_run(tmp_path, "remote", *places, cache_dir=str(cache), cache_gb=0.01, retry_s=2.0))
        dead = Run([path, "data.retry_s=0.2"], tmp_path / "dead")
        assert dead.code(0) == 2, dead.text()
        assert f"motley train: {server.url}/train/tokens-0000" in dead.text() and "HTTP 500" in dead.text()
        assert "the same command goes on" in dead.text() and "Traceback" not in dead.text()
        record = json.loads((run_dir / "record.json").read_text())
        assert "HTTP 500" in record["attempts"][-1]["reason"]

        server.failing, server.fault_frac, server.faults = "", 0.1, ("500", "truncate", "drop")
        run = Run([path], tmp_path / "out")
        run.wait_until(lambda: (run_dir / "checkpoints/step_00000005").exists())
        run.signal(signal.SIGKILL)
        run.codes()
        train([path, "data.cache_gb=0.009"], tmp_path / "out")
        assert numbers(run_dir) == numbers(tmp_path / "runs/local")
        assert bytes_of(cache) <= 9_000_000
        assert audit(run_dir), "the index of the URL has the fingerprints of the rows"
    output = (tmp_path / "out").read_text()
    assert f"{server.url}/train: 200 documents" in output and "SECRET" not in output
