import shutil
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from data_pipeline.shards.tar import ShardError
from pretrain.config import RunConfig
from pretrain.data_manifest import data_manifest, data_name
from pretrain.run_tokenizers import tokenizers_of_run
from tests.data_pipeline.remote.flaky_server import serving
from tests.pretrain.tiny_data import tiny_run, write_tiny_data


def config_of(path: str, cache: Path) -> RunConfig:
    values = tiny_run(Path("data"), Path("runs"))
    values["data"] = {"train": [{"path": path}], "cache_dir": str(cache), "retry_s": 0.0}
    return validate(RunConfig, values, source="run.toml")


def test_the_manifest_is_that_of_the_folder_or_of_the_url(tmp_path: Path) -> None:
    write_tiny_data(tmp_path / "data")
    local = config_of(str(tmp_path / "data/train"), tmp_path / "cache")
    assert data_name(local) == str(tmp_path / "data/train")
    with serving(tmp_path) as server:
        remote = config_of(f"{server.url}/data/train?sig=SECRET", tmp_path / "cache")
        assert data_manifest(remote) == data_manifest(local)
        assert data_name(remote) == f"{server.url}/data/train"
        with pytest.raises(ConfigError, match=r"behind a URL, so no tokenizers lie beside it"):
            tokenizers_of_run(tmp_path, remote, None)
        shutil.rmtree(tmp_path / "data")
        for gone in (local, remote):
            with pytest.raises(ShardError, match=r"no manifest\.json|HTTP 404"):
                data_manifest(gone)
