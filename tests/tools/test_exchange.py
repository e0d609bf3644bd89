"""`motley export` and `motley import` from a real checkpoint, and what a tired person asks of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pretrain.checkpoint.folder import MANIFEST, STATE, seal
from pretrain.config import load
from pretrain.models.routing_state import RoutingState
from pretrain.weights.folder import INDEX, MODEL, SINGLE, digest, find_corruption, open_weights
from pretrain.weights.sources import open_source
from tests.numerics.test_imported_logits import decoder_of, logits, reference_logits, whole_documents, widened
from tests.pretrain.models.precision import assert_close
from tests.pretrain.tiny_data import VOCABULARY
from tests.pretrain.tiny_hugging_face import tiny_hugging_face
from tests.pretrain.trained_run import STEP, run_values, write_config, write_trained_run
from tests.toml_text import toml_text
from tools.cli import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_trained_run(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, trained: Path) -> Path:
    """A copy of a trained run and its data to spoil, with a RUN.toml of a MoT that is to start from it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    write_config(tmp_path)
    values = run_values(tmp_path) | {"name": "mot"}
    values["model"] |= {"towers": {m: m for m in VOCABULARY.modalities}}
    (tmp_path / "mot.toml").write_text(toml_text(values))
    return tmp_path


def test_export_says_what_it_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder / "runs/dense"), str(folder / "out"), "--file-gb", "2e-5"]) == 0
    assert "tensors of dense, step 2, fp32" in capsys.readouterr().out
    assert (folder / "out" / INDEX).exists() and find_corruption(folder / "out") == []


def test_checkpoint_and_its_export_give_the_same(folder: Path) -> None:
    step = folder / "runs/dense/checkpoints/step_00000002"
    assert main(["export", str(folder / "runs/dense"), str(folder / "a")]) == 0
    assert main(["export", str(step), str(folder / "b")]) == 0
    assert main(["export", str(folder / "a"), str(folder / "c")]) == 0
    assert digest(folder / "a") == digest(folder / "b") == digest(folder / "c")
    assert main(["export", str(folder / "runs/dense"), str(folder / "e"), "--ema"]) == 0
    assert digest(folder / "e") != digest(folder / "a")
    assert main(["export", str(folder / "a"), str(folder / "d"), "--dtype", "bf16"]) == 0
    assert (folder / "d" / SINGLE).stat().st_size < 0.6 * (folder / "a" / SINGLE).stat().st_size


def test_an_export_holds_the_thresholds_of_its_checkpoint(
    depth_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exports of earlier versions are told to lack them."""
    assert main(["export", str(depth_run.parent / "runs" / "tiny"), str(tmp_path / "a")]) == 0
    checkpoint = open_source(depth_run.parent / "runs" / "tiny")
    saved = json.loads((checkpoint.path / STATE).read_text())["state"]["thresholds"]
    assert open_weights(tmp_path / "a").routing_state == RoutingState(thresholds=saved, progress=1.0)
    assert len(saved) == 4 and "thresholds" not in capsys.readouterr().out
    about = json.loads((tmp_path / "a" / MODEL).read_text()) | {"format": 1}
    (tmp_path / "a" / MODEL).write_text(json.dumps(about | {"routers": None}))
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert f"no thresholds of routers, which {tmp_path / 'a'} does not hold" in capsys.readouterr().out


def test_export_for_transformers_computes_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["export", str(folder / "runs/dense"), str(folder / "own")]) == 0
    assert main(["export", str(folder / "runs/dense"), str(folder / "hf"), "--format", "llama"]) == 0
    source = open_weights(folder / "own")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM"  # it has QK-norm
    batch = whole_documents(source.model)
    expected = reference_logits(widened(theirs, monkeypatch), batch)
    assert_close(logits(source, batch, torch.float64), expected, "logits")


def test_import_from_a_run_starts_each_tower_as_a_copy(folder: Path) -> None:
    assert main(["import", str(folder / "mot.toml"), str(folder / "runs/dense"), str(folder / "out")]) == 0
    assert main(["export", str(folder / "runs/dense"), str(folder / "own")]) == 0
    mot, dense = open_weights(folder / "out"), open_weights(folder / "own")
    assert mot.model == load(folder / "mot.toml").model
    batch = whole_documents(dense.model)
    # The same products in slices: 5e-7 measured on logits of magnitude 3.
    assert_close(logits(mot, batch, torch.float64), logits(dense, batch, torch.float64), "logits")
    assert decoder_of(mot).blocks[0].attention.qkv.weight.keys() == set(VOCABULARY.modalities)


def test_import_of_a_llama_needs_only_its_shape(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_hugging_face("llama_tied", folder / "hf")
    shape = {"d_model": 16, "ffn_hidden": 24, "num_heads": 4, "num_kv_heads": 2, "qk_norm": "false"}
    changes = [
        f"model.{key}={value}" for key, value in (shape | {"norm_eps": 1e-6, "rope_theta": 500}).items()
    ]
    arguments = ["import", str(folder / "mot.toml"), str(folder / "hf"), str(folder / "out")]
    assert main([*arguments, *changes]) == 2
    assert "tokenize the data with [text] kind" in capsys.readouterr().err
    assert main([*arguments, *changes, "--unchecked-ids"]) == 0
    assert f"unchecked: the vocabulary of {folder / 'hf'} is not known" in capsys.readouterr().out
    assert open_weights(folder / "out").vocabulary == VOCABULARY.sizes


def _old_format(folder: Path) -> None:
    path = folder / "runs/dense/checkpoints/step_00000002" / MANIFEST
    path.write_text(json.dumps(seal(json.loads(path.read_text()) | {"format": 1})))


def _flip(folder: Path) -> None:
    path = folder / "runs/dense/checkpoints/step_00000002/engine/rank_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _nothing(folder: Path) -> None:
    pass


TIRED: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "a folder that is not there": (_nothing, ["export", "runs/dens", "out"], ["runs/dens is no folder"]),
    "a folder of something else": (_nothing, ["export", "data/train", "out"], ["holds no weights", "legal"]),
    "the folder of all runs": (_nothing, ["export", "runs", "out"], ["holds no weights", "a run directory"]),
    "the folder of checkpoints": (_nothing, ["export", "runs/dense/checkpoints", "out"], ["step_..."]),
    "a checkpoint that is not there": (
        _nothing, ["export", "runs/dense/checkpoints/step_00000009", "out"], ["is no folder"],
    ),
    "a run without a checkpoint": (
        lambda f: shutil.rmtree(f / "runs/dense/checkpoints"),
        ["export", "runs/dense", "out"], ["no checkpoint yet", "every_steps.checkpoint = 5"],
    ),
    "a checkpoint of another format": (
        _old_format, ["export", "runs/dense", "out"], ["format 1", "the version that wrote it"],
    ),
    "a damaged checkpoint": (
        _flip, ["export", "runs/dense", "out"],
        ["step_00000002 is damaged: engine/rank_00001.safetensors", "Other checkpoints there: none"],
    ),
    "OUT exists": (
        lambda f: (f / "out").mkdir(), ["export", "runs/dense", "out"], ["out exists; choose another folder"],
    ),
    "OUT is a file": (lambda f: (f / "out").touch(), ["export", "runs/dense", "out"], ["out exists"]),
    "OUT inside SRC": (_nothing, ["export", "runs/dense", "runs/dense/export"], ["is inside", "beside it"]),
    "OUT is SRC": (_nothing, ["export", "runs/dense", "runs/dense"], ["exists"]),
    "OUT where nobody may write": (_nothing, ["export", "runs/dense", "/proc/out"], ["/proc/out: cannot be"]),
    "files of no limit": (_nothing, ["export", "runs/dense", "out", "--file-gb", "inf"], ["--file-gb inf"]),
    "files of no size": (_nothing, ["export", "runs/dense", "out", "--file-gb", "0"], ["--file-gb 0.0"]),
    "a MoT as a Llama": (
        lambda f: main(["import", str(f / "mot.toml"), str(f / "runs/dense"), str(f / "mot")]),
        ["export", "mot", "out", "--format", "llama"], ["towers text, image, speech", "--format motley"],
    ),
    "RUN.toml and SRC swapped": (
        _nothing, ["import", "runs/dense", "mot.toml", "out"], ["mot.toml is no folder"],
    ),
    "no RUN.toml": (_nothing, ["import", "more.toml", "runs/dense", "out"], ["more.toml: no such file"]),
    "a shape that is not the run's": (
        _nothing, ["import", "mot.toml", "runs/dense", "out", "model.num_layers=3"],
        ["model.num_layers = 3, there 2", "set model.num_layers=2"],
    ),
    "a tower that is not new": (
        _nothing, ["import", "mot.toml", "runs/dense", "out", "--new-tower", "image=text"],
        ["--new-tower image=text", "there is none"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TIRED)
def test_mistakes_are_one_message_and_leave_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    spoil, arguments, expected = TIRED[case]
    spoil(folder)
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"motley {arguments[0]}: ") and "Traceback" not in error
    for part in expected:
        assert part in error, error
    assert sorted(folder.rglob("*")) == before


def test_a_pair_without_a_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["import", "a.toml", "b", "c", "--new-tower", "image"])
    assert "expected NEW=TOWER, such as image=text" in capsys.readouterr().err


def test_model_json_says_whose_weights_they_are(folder: Path) -> None:
    assert main(["export", str(folder / "runs/dense"), str(folder / "out")]) == 0
    about = json.loads((folder / "out" / MODEL).read_text())
    assert about["name"] == "dense" and about["step"] == STEP and about["dtype"] == "fp32"
    assert list(about["files"]) == [SINGLE] and len(about["files"][SINGLE]["sha256"]) == 64
