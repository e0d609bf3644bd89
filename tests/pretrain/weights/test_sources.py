"""Weights are read from whatever holds some; the mistakes are in tests/tools/test_exchange.py."""

import shutil
from pathlib import Path

import pytest
import torch

from data_pipeline.files.atomic import write_json
from data_pipeline.files.toml_config import ConfigError
from parallel.logical import logical_of
from parallel.weight_average import EMA
from pretrain.checkpoint.folder import read_manifest
from pretrain.checkpoint.shards import ShardReader
from pretrain.models.decoder import Decoder
from pretrain.run_identity import draw_identity
from pretrain.weights.folder import MODEL, about_model, write_folder
from pretrain.weights.sources import open_source
from tests.pretrain.tiny_data import VOCABULARY
from tests.pretrain.tiny_hugging_face import tiny_hugging_face
from tests.pretrain.trained_run import STEP, write_config, write_trained_run

Trained = tuple[Path, list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    return folder, write_trained_run(folder)


def test_a_checkpoint_gives_what_the_ranks_held(trained: Trained) -> None:
    folder, held = trained
    source = open_source(folder / "runs/dense")
    assert (source.name, source.step, source.vocabulary) == ("dense", STEP, VOCABULARY.sizes)
    decoder = dict(Decoder(source.model).named_parameters())
    assert source.tensors.keys() == decoder.keys()
    for rank, parts in enumerate(held):
        for name, parameter in decoder.items():
            part = logical_of(parameter).cut(source.tensors[name].read(), rank, 2)
            assert torch.equal(part, parts[name]), name


def test_averages_of_a_run_are_a_source_of_their_own(trained: Trained, tmp_path: Path) -> None:
    folder = trained[0]
    raw, averaged = open_source(folder / "runs/dense"), open_source(folder / "runs/dense", ema=True)
    assert averaged.tensors.keys() == raw.tensors.keys()
    manifest, _ = read_manifest(averaged.path)
    with ShardReader(averaged.path, manifest["tensors"]) as reader:
        for name, tensor in averaged.tensors.items():
            assert torch.equal(tensor.read(), reader.whole(name, EMA)), name
            assert not torch.equal(tensor.read(), raw.tensors[name].read()), name
    write_folder(tmp_path / "own", averaged, {MODEL: about_model(averaged)}, dtype="fp32", file_bytes=10**9)
    with pytest.raises(ConfigError, match="own holds no averages of weights; runs and their checkpoints"):
        open_source(tmp_path / "own", ema=True)


def test_the_newest_checkpoint_is_taken_unless_one_is_named(tmp_path: Path, trained: Trained) -> None:
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    write_config(tmp_path)
    saved = tmp_path / "runs/dense/checkpoints"
    (saved / "step_00000001").mkdir()
    assert open_source(tmp_path / "runs/dense").path == saved / "step_00000002"
    with pytest.raises(ConfigError, match=r"step_00000001 is damaged: .*Other .* there: step_00000002"):
        open_source(saved / "step_00000001")
    assert open_source(saved / "step_00000002").step == STEP


def test_a_checkpoint_of_another_run_is_no_source(tmp_path: Path, trained: Trained) -> None:
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    write_config(tmp_path)
    run = tmp_path / "runs/dense"
    record = {"format": 1, "attempts": [], "run": draw_identity(run).to_json()}
    write_json(run / "record.json", record)
    assert open_source(run).step == STEP  # of a version that named no runs
    write_json(run / "record.json", record | {"format": 2})
    with pytest.raises(ConfigError, match="step_00000002 is a checkpoint of another run: it names no run"):
        open_source(run)
    write_json(run / "record.json", record)
    (run / "config.resolved.json").write_text((run / "config.resolved.json").read_text() + " ")
    with pytest.raises(ConfigError, match=r"config\.resolved\.json is not the file that the run began with"):
        open_source(run)


def test_weights_of_ours_and_of_hugging_face_are_told_apart(tmp_path: Path, trained: Trained) -> None:
    tiny_hugging_face("llama", tmp_path / "hf")
    theirs = open_source(tmp_path / "hf")
    assert (theirs.name, theirs.step, theirs.vocabulary) == ("hf", None, None)
    run = open_source(trained[0] / "runs/dense")
    write_folder(tmp_path / "own", run, {MODEL: about_model(run)}, dtype="fp32", file_bytes=10**9)
    own = open_source(tmp_path / "own")
    assert (own.model, own.name, own.step) == (run.model, "dense", STEP)


def test_a_run_whose_data_is_gone_still_has_its_weights(tmp_path: Path, trained: Trained) -> None:
    shutil.copytree(trained[0] / "runs", tmp_path / "runs")
    write_config(tmp_path)
    assert open_source(tmp_path / "runs/dense").vocabulary is None


def test_a_checkpoint_that_its_run_prunes_meanwhile_is_one_message(tmp_path: Path, trained: Trained) -> None:
    shutil.copytree(trained[0] / "runs", tmp_path / "runs")
    write_config(tmp_path)
    run = open_source(tmp_path / "runs/dense")
    shutil.rmtree(run.path)
    with pytest.raises(
        ConfigError, match=r"step_00000002 was removed .* keep_checkpoints = .*export a newer"
    ):
        write_folder(tmp_path / "own", run, {MODEL: about_model(run)}, dtype="fp32", file_bytes=10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_a_checkpoint_whose_file_vanishes_while_it_is_read_is_one_message(
    tmp_path: Path, trained: Trained
) -> None:
    shutil.copytree(trained[0] / "runs", tmp_path / "runs")
    write_config(tmp_path)
    run = open_source(tmp_path / "runs/dense")
    (run.path / "engine/rank_00001.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"rank_00001\.safetensors: .* cannot be read"):
        write_folder(tmp_path / "own", run, {MODEL: about_model(run)}, dtype="fp32", file_bytes=10**9)
