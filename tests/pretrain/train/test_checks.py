"""What does not fit together is one message that says what to change."""

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.files.toml_config import ConfigError, validate
from data_pipeline.shards.index_file import INDEX
from pretrain.config import RunConfig
from pretrain.models.logical_weights import logical_shapes
from pretrain.train.checks import check_run
from pretrain.weights.folder import MODEL, LazyTensor, WeightSource, about_model, write_folder
from tests.pretrain.tiny_data import VOCABULARY, document, tiny_run, write_tiny_data, write_tokens
from tests.pretrain.tiny_vectors import vectors_run, write_tiny_vectors

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    write_tiny_data(tmp_path)
    return tiny_run(tmp_path, tmp_path / "runs")


def check(values: dict[str, Any], world_size: int = 1) -> None:
    check_run(validate(RunConfig, values, source="run.toml"), world_size)


Edit = Callable[[dict[str, Any]], Any]

MISFITS: dict[str, tuple[Edit, int, list[str]]] = {
    "no such data folder": (
        lambda values: values["data"].update(train=[{"path": "nowhere/train"}]),
        1,
        ['data.train[0].path = "nowhere/train": no such folder', str(Path.cwd()), "motley tokenize"],
    ),
    "the second of two": (
        lambda values: values["data"]["train"].append({"path": "nowhere/more"}),
        1,
        ['data.train[1].path = "nowhere/more": no such folder'],
    ),
    "a data folder that holds no token shards": (
        lambda values: values["data"].update(train=[{"path": str(REPOSITORY / "tests")}]),
        1,
        ["data.train[0].path", "no manifest.json"],
    ),
    "no such held-out folder": (
        lambda values: values["data"].update(heldout="nowhere/heldout"),
        1,
        ['data.heldout = "nowhere/heldout": no such folder'],
    ),
    "nothing to train": (
        lambda values: values["optimizer"].update(
            towers={name: {"frozen": True} for name in (*VOCABULARY.modalities, "shared")}
        ),
        1,
        ["nothing is left to train", "set frozen = false for one of image, shared, speech, text"],
    ),
    "a vocabulary that is too small": (
        lambda values: values["model"].update(vocab_tokens=40),
        1,
        [
            "vocabulary of 52 ids (24 text + 16 image + 12 speech)",
            "model.vocab_tokens = 40",
            "vocab_tokens=52",
        ],
    ),
    "towers that leave a modality out": (
        lambda values: values["model"].update(towers={"text": "text", "image": "image"}),
        1,
        ["holds the modalities text, image, speech, but model.towers names text, image;"],
    ),
    "towers in another order": (
        lambda values: values["model"].update(towers={"text": "a", "speech": "b", "image": "c"}),
        1,
        ["text, image, speech, but model.towers names text, speech, image;", "in their order"],
    ),
    "vectors of what the data has as ids": (
        lambda values: values["model"].update(vectors={"image": {"features": 4}}),
        1,
        ["data.train[0].path", "holds ids of image, but model.vectors.image is set; take that table out"],
    ),
    "processes that do not divide the step": (
        lambda values: None,
        3,
        ["4 sequences per step cannot be split over dp = 3 ranks", "make tokens_per_step"],
    ),
    "more tensor-parallel ranks than heads": (
        lambda values: values["parallel"].update(tp=4),
        4,
        ["parallel.tp = 4 does not divide model.num_heads = 2", "parallel.tp = 1, 2"],
    ),
    "bf16 without a sharded optimizer": (
        lambda values: values.update(precision="bf16", parallel={"zero_stage": 0}),
        1,
        ["zero_stage = 0", "use zero_stage = 1"],
    ),
    "a key of earlier versions": (
        lambda values: values["data"].update(max_bad_documents=100),
        1,
        ["data.max_bad_documents: there is no such key any more: data.max_unreadable_frac says which share"],
    ),
    "the same source twice": (
        lambda values: values["data"]["train"].append(values["data"]["train"][0] | {"weight": 2.0}),
        1,
        ["data.train[1].path", "holds the same shards (sha256) as data.train[0].path", "sum of the weights"],
    ),
    "more documents than are held out": (
        lambda values: values["evaluate"].update(last_documents=61),
        1,
        ["evaluate.last_documents = 61, but data.heldout", "holds 60 documents; ask for at most these"],
    ),
    "documents of no held-out data": (
        lambda values: (values["evaluate"].update(last_documents=5), values["data"].pop("heldout")),
        1,
        ["evaluate.last_documents = 5 needs held-out documents; set data.heldout, or take it out"],
    ),
    "images longer than the context": (
        lambda values: values["model"].update(context_tokens=8),
        1,
        ["longer than context_tokens = 8"],
    ),
}


def test_vectors_of_other_features_are_told(tmp_path: Path):
    write_tiny_vectors(tmp_path)
    check(vectors_run(tmp_path, tmp_path / "runs"))
    for vectors, told in (({"image": {"features": 5}}, "has features = 5"), ({}, "is not set")):
        values = vectors_run(tmp_path, tmp_path / "runs")
        values["model"]["vectors"], values["loss_weights"] = vectors, {}
        with pytest.raises(ConfigError, match=rf"vectors of 4 features for image, but .* {told}; set .*=4"):
            check(values)


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_misfit_is_told_with_what_to_change(values: dict[str, Any], misfit: str):
    edit, world_size, expected = MISFITS[misfit]
    edit(values)
    with pytest.raises(ConfigError) as error:
        check(values, world_size)
    for part in expected:
        assert part in str(error.value), error.value


@pytest.mark.parametrize("field", ["heldout", "train"])
def test_data_of_another_tokenizer_is_refused(tmp_path: Path, values: dict[str, Any], field: str):
    rng = np.random.default_rng(5)
    write_tokens(tmp_path / "other", [document(rng) for _ in range(20)], fingerprint="other")
    other = str(tmp_path / "other")
    values["data"] |= {"heldout": other} if field == "heldout" else {"train": [{"path": other}]}
    with pytest.raises(ConfigError, match="tokenize both with the same tokenizers"):
        check(values)


def test_training_data_that_is_held_out_is_refused_whatever_its_folder_is_called(
    tmp_path: Path, values: dict[str, Any]
):
    shutil.copytree(tmp_path / "heldout", tmp_path / "more")
    values["data"]["train"].append({"path": str(tmp_path / "more")})
    with pytest.raises(ConfigError) as error:
        check(values)
    for part in ("data.heldout", "holds 2 shards of data.train[1].path", "(sha256; the first is tokens-0"):
        assert part in str(error.value), error.value
    values["data"] |= {"heldout": None}
    check(values)


def test_more_documents_may_be_too_long_where_the_run_says_so(values: dict[str, Any]):
    values["model"]["context_tokens"] = 8
    values["data"]["max_too_long_frac"] = 0.99
    check(values)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_fits_passes_and_leaves_the_index_made(tmp_path: Path, values: dict[str, Any], world_size: int):
    check(values, world_size)
    assert (tmp_path / "train" / INDEX).exists() and (tmp_path / "heldout" / INDEX).exists()
    assert not (tmp_path / "runs").exists()


def write_weights(folder: Path, values: dict[str, Any], vocabulary: dict[str, int] | None = None) -> None:
    """Weights of the model in `values`."""
    model = validate(RunConfig, values, source="run.toml").model
    tensors = {
        name: LazyTensor(shape, partial(torch.zeros, shape)) for name, shape in logical_shapes(model).items()
    }
    source = WeightSource(folder / "nowhere", model, tensors, "before", 9, vocabulary)
    write_folder(folder, source, {MODEL: about_model(source)}, dtype="fp32", file_bytes=10**9)


DENSE = {"text": "all", "image": "all", "speech": "all"}
OTHER_WEIGHTS: dict[str, tuple[Edit, list[str]]] = {
    "weights of the dense model": (
        lambda values: values["model"].update(towers=DENSE),
        ["missing: blocks.0.attention.qkv.weight.text", "not part of it", "motley import RUN.toml SRC OUT"],
    ),
    "another width": (
        lambda values: values["model"].update(d_model=64),
        ["model.d_model = 32, there 64", "set model.d_model=64", "motley import"],
    ),
    "another norm": (
        lambda values: values["model"].update(norm_placement="pre"),
        ["model.norm_placement = post, there pre"],
    ),
    "more rows": (
        lambda values: values["model"].update(vocab_tokens=60),
        ["model.vocab_tokens = 52", "set model.vocab_tokens=60 or more"],
    ),
    "fewer rows": (
        lambda values: values["model"].update(vocab_tokens=50),
        ["embedding.weight.shared [50, 32] instead of [52, 32]", "motley import"],
    ),
}


def test_new_depth_routers_need_no_weights(tmp_path: Path, values: dict[str, Any]):
    write_weights(tmp_path / "weights", values)
    values["initial_weights"] = str(tmp_path / "weights")
    values["model"]["depth"] = {"image": {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold"}}
    check(values)


@pytest.mark.parametrize("case", OTHER_WEIGHTS)
def test_weights_of_another_model_are_told(tmp_path: Path, values: dict[str, Any], case: str):
    edit, expected = OTHER_WEIGHTS[case]
    theirs = copy.deepcopy(values)
    edit(theirs)
    write_weights(tmp_path / "weights", theirs)
    values["initial_weights"] = str(tmp_path / "weights")
    with pytest.raises(ConfigError) as error:
        check(values)
    for part in (f'initial_weights = "{tmp_path / "weights"}": ', *expected):
        assert part in str(error.value), error.value


def test_weights_for_other_ids_are_told(tmp_path: Path, values: dict[str, Any]):
    write_weights(tmp_path / "weights", values, {"text": 23, "image": 16, "speech": 13})
    values["initial_weights"] = str(tmp_path / "weights")
    with pytest.raises(ConfigError, match=r"made for .*\('text', 23\).*, the run has .*\('text', 24\)"):
        check(values)


def test_a_folder_without_weights_is_told(tmp_path: Path, values: dict[str, Any]):
    values["initial_weights"] = str(tmp_path / "wieghts")
    with pytest.raises(ConfigError, match=r"wieghts/model.json: no such file\. `motley import"):
        check(values)


def test_weights_are_looked_at_only_where_a_run_begins(tmp_path: Path, values: dict[str, Any]):
    write_weights(tmp_path / "weights", values, dict(VOCABULARY.sizes))
    values["initial_weights"] = str(tmp_path / "weights")
    check(values)
    (tmp_path / "weights").rename(tmp_path / "archived")
    with pytest.raises(ConfigError, match="no such file"):
        check(values)
    (tmp_path / "runs/tiny/checkpoints/step_00000005").mkdir(parents=True)
    check(values)
