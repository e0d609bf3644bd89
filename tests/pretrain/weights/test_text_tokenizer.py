"""Weights of Hugging Face and their tokenizer: the ids of the data mean what the weights learned."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import read_manifest
from data_pipeline.tokenize.prepare import tokenize
from pretrain.weights.hugging_face import open_hugging_face
from pretrain.weights.text_tokenizer import checked_ids, exported_files
from pretrain.weights.warm_start import check_fingerprints
from tests.data_pipeline.tokenize.tiny_text_tokenizers import TEXTS, hugging_face_file
from tests.pretrain.tiny_hugging_face import tiny_hugging_face


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: weights and their tokenizer; bare: the weights alone; own, theirs: data of two text tokenizers."""
    folder = tmp_path_factory.mktemp("foreign")
    tiny_hugging_face("qwen3", folder / "hf", vocab_size=320)
    tiny_hugging_face("qwen3", folder / "bare", vocab_size=320)
    hugging_face_file(folder / "hf")
    (folder / "raw").mkdir()
    (folder / "raw/rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    source = '[source]\nparts = [{text = "json:text"}]\n'
    text = f'[text]\nkind = "huggingface"\nfile = "{folder / "hf"}"\n'
    for name, table in (("own", "[text]\nvocab_size = 512\n"), ("theirs", text)):
        (folder / f"{name}.toml").write_text(table + source)
        tokenize(folder / "raw", folder / name, config_path=str(folder / f"{name}.toml"), processes=1)
    return folder


def test_the_tokenizer_of_the_folder_is_taken(folder: Path) -> None:
    data, weights = folder / "theirs", open_hugging_face(folder / "hf")
    assert checked_ids(weights, str(data), read_manifest(data), None).vocabulary == {"text": 300}
    bare = open_hugging_face(folder / "bare")
    assert checked_ids(bare, str(data), read_manifest(data), folder / "hf").vocabulary == {"text": 300}


def test_ids_of_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    weights, bare = open_hugging_face(folder / "hf"), open_hugging_face(folder / "bare")
    theirs = str(folder / "theirs"), read_manifest(folder / "theirs")
    with pytest.raises(
        ConfigError, match=r'of kind "bpe", which .* other words; tokenize the data with \[text'
    ):
        checked_ids(weights, str(folder / "own"), read_manifest(folder / "own"), None)
    with pytest.raises(
        ConfigError, match=r"which tokenizer it was trained with is not known .*--tokenizer PATH"
    ):
        checked_ids(bare, *theirs, None)
    other = hugging_face_file(tmp_path, model={"ignore_merges": True})
    with pytest.raises(ConfigError, match=r"not the tokenizer that made .* the same ids mean other words"):
        checked_ids(bare, *theirs, other)
    with pytest.raises(ConfigError, match=r"nope: the data is not tokenized yet"):
        checked_ids(weights, "nope", None, None)
    with pytest.raises(ConfigError, match=r"rows for 299 ids, but .* has 300"):
        small = replace(weights, model=weights.model.model_copy(update={"vocab_tokens": 299}))
        checked_ids(small, *theirs, None)


def test_files_for_transformers_are_of_the_tokenizer_of_the_weights(folder: Path) -> None:
    weights, of_own = open_hugging_face(folder / "hf"), folder / "own/tokenizers"
    theirs = read_manifest(folder / "theirs")["tokenizers"]["text"]["fingerprint"]
    known = replace(weights, tokenizers={"text": theirs})
    files = exported_files(known, None, folder / "theirs/tokenizers")
    assert {*files} == {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(ConfigError, match=r"--tokenizers .*own/tokenizers: the text tokenizer there is"):
        exported_files(known, None, of_own)
    assert exported_files(weights, None, of_own), "nobody knows which it should be"
    with pytest.raises(ConfigError, match=r"--tokenizers DIR does"):
        exported_files(weights, None, None)


def test_weights_of_a_run_know_their_tokenizers(folder: Path) -> None:
    weights = replace(open_hugging_face(folder / "hf"), tokenizers={"text": "abc", "image": "def"})
    check_fingerprints(weights, {"text": "abc", "speech": "x"}, "data")
    with pytest.raises(ConfigError, match=r"ids of the image tokenizer def, but those of data are of other"):
        check_fingerprints(weights, {"text": "abc", "image": "other"}, "data")
