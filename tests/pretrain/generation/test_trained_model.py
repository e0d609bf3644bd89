import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.files.toml_config import ConfigError, validate
from data_pipeline.tokenize.kinds.patches import PixelConfig, PixelPatches
from data_pipeline.tokenize.registry import save_tokenizer
from data_pipeline.tokenize.tokenizer_set import load_tokenizers
from pretrain.config import RunConfig
from pretrain.generation.trained_model import open_model, routing_state_of
from pretrain.models.decoder import Decoder
from pretrain.models.routing_state import RoutingState
from pretrain.models.vectors_config import VectorsConfig
from pretrain.run_files import CONFIG
from pretrain.weights.folder import MODEL, WeightSource
from tests.pretrain.models.random_batch import depth_tables
from tests.pretrain.tiny_data import tiny_run
from tests.pretrain.tiny_tokenizers import write_tiny_tokenizers, write_tokenized_data
from tests.toml_text import toml_text


def test_weights_open_with_their_tokenizers(speaker: Path) -> None:
    model = open_model(speaker / "weights", speaker / "tokenizers")
    assert model.span_codes == {"image": 4} and model.heldout is None
    for name, parameter in model.decoder.named_parameters():
        torch.testing.assert_close(parameter, model.source.tensors[name].read(), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="--tokenizers DIR"):
        open_model(speaker / "weights")
    with pytest.raises(ConfigError, match="no tokenizers here"):
        open_model(speaker / "weights", speaker)


def test_tokenizers_that_were_changed_or_make_other_ids_are_refused(speaker: Path, tmp_path: Path) -> None:
    shutil.copytree(speaker / "tokenizers", tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / "speech")
    with pytest.raises(ConfigError, match=r"trained on ids .*'speech': 4.*, but .*fewer make"):
        open_model(speaker / "weights", tmp_path / "fewer")
    changed = Path(shutil.copytree(speaker / "tokenizers", tmp_path / "changed")) / "image" / "codebook.npy"
    np.save(changed, np.load(changed)[::-1])
    with pytest.raises(ConfigError, match="its files were changed after they were saved"):
        open_model(speaker / "weights", tmp_path / "changed")


def test_equally_large_tokenizers_that_did_not_make_the_ids_of_weights_are_refused(
    speaker: Path, tmp_path: Path
) -> None:
    weights = Path(shutil.copytree(speaker / "weights", tmp_path / "weights"))
    about = json.loads((weights / MODEL).read_text())
    made_by = {name: one.fingerprint for name, one in load_tokenizers(speaker / "tokenizers").items()}
    for tokenizers in (made_by, made_by | {"image": "0123"}):
        (weights / MODEL).write_text(json.dumps(about | {"tokenizers": tokenizers}))
        if tokenizers == made_by:
            open_model(weights, speaker / "tokenizers")
    with pytest.raises(ConfigError, match=r"the image tokenizer 0123, but that of .*tokenizers is \w+"):
        open_model(weights, speaker / "tokenizers")


def write_run(folder: Path) -> Path:
    """The directory of a run that has not begun, over data with tokenizers."""
    vocabulary = write_tokenized_data(folder / "data")
    values = tiny_run(folder / "data", folder / "runs")
    values["model"]["vocab_tokens"] = vocabulary.size
    config = validate(RunConfig, values, source="test")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / CONFIG).write_text(config.model_dump_json())
    return config.run_dir


def test_a_run_is_told_what_it_lacks(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    data = tmp_path / "data"
    with pytest.raises(ConfigError, match="tiny has no checkpoint yet"):
        open_model(run)
    manifest = (data / "train" / "manifest.json").read_text()
    changed = json.loads(manifest)
    changed["tokenizers"]["image"]["fingerprint"] = "0123"
    (data / "train" / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=r"tokenizers/image: fingerprint \w+, but .*train was made by 0123"):
        open_model(run)
    (data / "tokenizers").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=r"no tokenizers in .*train/tokenizers or .*data/tokenizers"):
        open_model(run)
    (data / "train" / "manifest.json").write_text(manifest)
    with pytest.raises(ConfigError, match="tiny has no checkpoint yet"):
        open_model(run, tmp_path / "away")
    path = tmp_path / "run.toml"
    path.write_text(toml_text(tiny_run(tmp_path, tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="no weights"):
        open_model(path)


def test_vectors_of_another_size_are_refused(speaker: Path, tmp_path: Path) -> None:
    write_tiny_tokenizers(tmp_path / "other", vectors=True)
    shutil.rmtree(tmp_path / "other" / "image")
    finer = PixelPatches(PixelConfig(size_px=8, patch_px=2), 127.5, 74.0)
    save_tokenizer(tmp_path / "other" / "image", "image", "patches", finer)
    with pytest.raises(ConfigError, match=r"features\) {'image': 48}, but .* make {'image': 12}; name"):
        open_model(speaker / "pixels" / "weights", tmp_path / "other")
    pixels = open_model(speaker / "pixels" / "weights", speaker / "pixels" / "tokenizers")
    assert pixels.span_codes == {"image": 4} and pixels.grammar("image").context_only == frozenset()
    unlearned = pixels.decoder.config.model_copy(
        update={"vectors": {"image": VectorsConfig(features=48, objective="none")}}
    )
    reader = replace(pixels, decoder=Decoder(unlearned))
    assert reader.grammar("free").context_only == {"image"}
    with pytest.raises(ConfigError, match=r"does not write image, because model\.vectors\.image"):
        reader.grammar("image")
    tokenizers = {**pixels.tokenizers, "image": pixels.tokenizers["speech"]}
    with pytest.raises(ConfigError, match="the image tokenizer gives any number of vectors"):
        replace(pixels, tokenizers=tokenizers).grammar("free")


DEPTH = {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k", "dense_frac": 0.5, "ramp_frac": 0.25}


def test_routers_choose_by_the_thresholds_of_the_checkpoint(tmp_path: Path) -> None:
    """In the causal form, at the ratios of its step."""
    values = tiny_run(tmp_path, tmp_path)
    values["model"] |= depth_tables(["image"], **DEPTH)
    config = validate(RunConfig, values, source="test")
    state = RoutingState(thresholds={"blocks.0.depth.image": 0.125}, progress=0.5)
    source = WeightSource(tmp_path, config.model, {}, "tiny", step=12, routing_state=state)
    assert routing_state_of(source) == replace(state, causal=True)
    with pytest.raises(ConfigError, match="by thresholds, and these weights hold none"):
        routing_state_of(replace(source, routing_state=None))
    values["model"] |= depth_tables(["image"], **DEPTH, gate="softmax")
    softmax = validate(RunConfig, values, source="test").model
    with pytest.raises(ConfigError, match="the gates of image depend on later tokens"):
        routing_state_of(replace(source, model=softmax))
    dense = validate(RunConfig, tiny_run(tmp_path, tmp_path), source="test").model
    assert routing_state_of(replace(source, model=dense, routing_state=None)) == RoutingState()
