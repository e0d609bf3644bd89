"""What the sampler of a run shows and judges, with the weights of an engine that did not train."""

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.files.toml_config import ConfigError, validate
from data_pipeline.shards.index import TokenSource
from data_pipeline.stream.stream import StreamState
from data_pipeline.tokenize.tokenizer_set import load_tokenizers
from pretrain.config import RunConfig
from pretrain.generation.trained_model import TrainedModel
from pretrain.models.decoder import Decoder
from pretrain.models.routing_state import RoutingState
from pretrain.tensorboard_view import TensorBoardView
from pretrain.train.checks import check_run
from pretrain.train.samples import fixed_prompts, sampler
from pretrain.train.state import TrainState
from pretrain.weights.folder import WeightSource
from tests.pretrain.small_judges import judge_in_small
from tests.pretrain.tiny_data import tiny_run
from tests.pretrain.tiny_tokenizers import PICTURE_PX, write_demo_like_data


def run_config(folder: Path, **more: Any) -> RunConfig:
    """A run over demo-like data that shows samples every 8 steps."""
    values = tiny_run(folder / "data", folder / "runs")
    values["model"]["vocab_tokens"] = write_demo_like_data(folder / "data").size
    values["every_steps"]["samples"] = 8
    return validate(RunConfig, values | more, source="test")


def shown(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "audio": 0, "tensors": 0})
    events.Reload()
    return events


def test_a_page_and_tensorboard_show_what_the_model_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge_in_small(monkeypatch)
    monkeypatch.setattr("pretrain.train.samples.MOST_TOKENS", 8)
    config = run_config(tmp_path, evaluate={"generate": 4})
    model = config.model.model_copy(update={"dropout": 0.5})  # samples drop nothing
    config = config.model_copy(update={"model": model})
    check_run(config, 1)
    config.run_dir.mkdir(parents=True)
    engine: Any = SimpleNamespace(
        deepspeed=SimpleNamespace(module=SimpleNamespace(decoder=Decoder(config.model, seed=1)))
    )
    stream = StreamState(0, 0, 0, seed=3, context_tokens=64, sources=(("hash", "1"),))
    state = replace(TrainState.start(stream), step=8)
    view = TensorBoardView(tmp_path / "events", attempt=0, purge_from_step=0)
    sample = sampler(config)
    assert sample(engine, state, view) == {} and engine.deepspeed.module.decoder.training
    assert sample(engine, replace(state, step=9), view) == {}  # neither samples nor facts are due
    facts = sample(engine, replace(state, step=config.num_steps), view)
    view.close()
    assert len(facts) == 18 and "eval/facts/text_to_image/judge_exact" in facts

    pages = sorted((config.run_dir / "samples").iterdir())
    assert [page.name for page in pages] == ["step_00000008.html", "step_00000024.html"]
    page = pages[0].read_text()
    # Two prompts a modality, with truth beside: nothing is loaded from elsewhere.
    assert page.count("<h2>") == 6 and page.count("<h3>truth</h3>") == 6
    assert set(re.findall(r'(?:src|href)="(.{5})', page)) == {"data:"} and "url(" not in page
    events = shown(tmp_path / "events")
    tags = [f"samples/{modality}/{n}" for modality in ("text", "image", "speech") for n in (0, 1)]
    assert events.Tags()["images"] == tags[2:4] and events.Tags()["audio"] == tags[4:]
    assert events.Tags()["tensors"] == [f"{tag}/text/text_summary" for tag in tags]
    (first, last) = events.Images(tags[2])
    assert (first.step, last.step) == (8, 24)
    assert Image.open(io.BytesIO(first.encoded_image_string)).size == (PICTURE_PX, PICTURE_PX)
    assert (first.width, first.height) == (PICTURE_PX, PICTURE_PX)
    sound = events.Audio(tags[4])[0]
    assert sound.sample_rate == 16_000 and sound.length_frames > 0 and sound.content_type == "audio/wav"
    (text, _) = events.Tensors(f"{tags[2]}/text/text_summary")
    assert b"[sample_0.png]" in text.tensor_proto.string_val[0]
    assert not capsys.readouterr().out

    def broken(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("pretrain.train.samples.show", broken)
    assert sampler(config)(engine, state, view_of(tmp_path)) == {}
    assert capsys.readouterr().out == "step 8: samples are not shown: OSError: the disk is full\n"


def view_of(folder: Path) -> TensorBoardView:
    return TensorBoardView(folder / "other_events", attempt=0, purge_from_step=0)


def test_a_run_whose_samples_could_not_be_read_does_not_start(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    few = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"generate": 90})})
    check_run(few, 1)  # fewer documents are there, and judged
    (tmp_path / "data" / "tokenizers").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=r"tiny: no tokenizers in .*data/tokenizers"):
        check_run(config, 1)


def test_what_is_context_alone_is_not_drawn(tmp_path: Path) -> None:
    """Images of objective "none" stand in prompts of text, and no sample holds one."""
    values = tiny_run(tmp_path / "data", tmp_path / "runs")
    vocabulary = write_demo_like_data(tmp_path / "data", vectors=True)
    own = {"features": 48, "objective": "none"}
    values["model"] |= {"vocab_tokens": vocabulary.size, "vectors": {"image": own}}
    values["every_steps"]["samples"] = 8
    config = validate(RunConfig, values, source="test")
    weights = WeightSource(tmp_path, config.model, {}, "tiny")
    tokenizers = load_tokenizers(tmp_path / "data" / "tokenizers")
    model = TrainedModel(weights, Decoder(config.model), tokenizers, vocabulary, RoutingState(), None)
    prompts = fixed_prompts(model, TokenSource.open(tmp_path / "data" / "heldout"))
    assert list(prompts) == ["text", "speech"]
    assert all(len(prompt.document.vectors["image"]) == 4 for prompt in prompts["text"])
    with pytest.raises(ConfigError, match='objective = "none" makes it context alone'):
        validate(RunConfig, values | {"evaluate": {"generate": 4}}, source="test")
