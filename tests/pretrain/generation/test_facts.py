"""Facts on data whose documents state digits as the demo corpus does."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline.demo.facts import Match
from data_pipeline.demo.scenes import PICTURE_PX
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document, TokenSource
from data_pipeline.tokenize.tokenizer_set import TOKENIZERS, load_tokenizers
from pretrain.generation import facts
from pretrain.generation.facts import (
    Accuracy,
    FactScore,
    describe_facts,
    fact_prompts,
    fact_row,
    score_facts,
    train_judges,
)
from pretrain.generation.sampling import Sampling
from pretrain.generation.trained_model import TrainedModel
from pretrain.models.decoder import Decoder
from pretrain.models.routing_state import RoutingState
from pretrain.weights.folder import WeightSource
from tests.pretrain.models.random_batch import MOT, tiny_config
from tests.pretrain.small_judges import judge_in_small
from tests.pretrain.tiny_tokenizers import write_demo_like_data, write_tokenized_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facts")
    write_demo_like_data(folder)
    return folder


def model_over(data: Path) -> TrainedModel:
    """An untrained model over the tokenizers of `data`."""
    source, tokenizers = TokenSource.open(data / "heldout"), load_tokenizers(data / TOKENIZERS)
    features = {m: {"features": form.features} for m, form in source.vocabulary.vectors.items()}
    config = tiny_config(MOT, context_tokens=64, vocab_tokens=source.vocabulary.size, vectors=features)
    weights = WeightSource(data, config, {}, "untrained")
    return TrainedModel(
        weights, Decoder(config, seed=1), tokenizers, source.vocabulary, RoutingState(), source.folder
    )


def test_accuracies_are_sums_over_samples() -> None:
    found = Accuracy.of([Match(True, 1, 1), Match(False, 2, 4), Match(False, 0, 0)])
    assert found == Accuracy(1 / 3, 3 / 5)
    assert Accuracy.of([Match(True, 0, 0)]) == Accuracy(1.0, 0.0)


def test_scores_are_those_of_the_prompts_digits_and_say_what_the_judge_misses(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_in_small(monkeypatch)
    model = model_over(data)
    train, heldout = (TokenSource.open(data / name) for name in ("train", "heldout"))
    prompts = fact_prompts(heldout, model.tokenizers, documents=6, context_tokens=64)
    assert {d: len(own) for d, own in prompts.items()} == dict.fromkeys(facts.MOST_TOKENS, 6)
    caption = model.tokenizers["text"].decode(prompts["text", "image"][0].document.ids[1:])
    assert caption == "red {}, blue {}\n{} and {}".format(*prompts["text", "image"][0].wanted * 2)

    judges = train_judges(model.tokenizers, train, heldout)
    assert judges.speech_accuracy.per_digit > 0.8  # words are runs of units: 1.0 measured
    scores = score_facts(model, prompts, judges, Sampling(seed=4))
    assert scores == score_facts(model, prompts, judges, Sampling(seed=4))
    assert scores["image", "text"].judge is None and scores["text", "image"].judge == judges.picture_accuracy
    row = fact_row(scores)
    assert len(row) == 4 + 6 + 6 + 2
    assert all(0 <= value <= 1 or name.endswith("frechet") for name, value in row.items())
    lines = describe_facts(scores)
    assert "of 6 samples" in lines[0] and "read by a rule" in lines[2]
    assert "Frechet distance over features of the judge of digits" in lines[1] and "no FID" in lines[1]
    assert f"the judge itself: {judges.speech_accuracy.exact:.3f}" in lines[3]

    def truth(model, prompts, *_, **__):  # what a model would write that knows the document
        return [[Document(np.concatenate([prompt.ids[1:], [2]]))] for prompt in prompts]

    monkeypatch.setattr("pretrain.generation.continuation.continue_prompts", truth)
    told = {("image", "text"): [p._replace(wanted=p.wanted) for p in prompts["text", "image"]]}
    (score,) = score_facts(model, told, judges, Sampling()).values()
    assert score.accuracy == Accuracy(1.0, 1.0) and score.foreign.per_digit < 1.0

    # Of a tokenizer with ids of its own, <eos> is 11, and the id 2 is text.
    ids = (0, 1, 11, *model.vocabulary.special_ids[3:])
    own = replace(model, vocabulary=model.vocabulary.model_copy(update={"special_ids": ids}))
    decoded: list[list[int]] = []
    text = SimpleNamespace(
        config=model.tokenizers["text"].config, decode=lambda ids: decoded.append(ids.tolist()) or ""
    )
    answers = lambda *_, **__: [[Document(np.array([2, 9, 11]))]]  # noqa: E731
    monkeypatch.setattr("pretrain.generation.continuation.continue_prompts", answers)
    own = replace(own, tokenizers={**own.tokenizers, "text": text})
    score_facts(own, {("image", "text"): told["image", "text"][:1]}, judges, Sampling())
    assert decoded == [[2, 9]]


def test_pictures_of_vectors_are_judged_in_the_size_of_the_corpus(tmp_path: Path) -> None:
    """The judge sees what the tokenizer makes of the vectors that were drawn."""
    write_demo_like_data(tmp_path, vectors=True)
    model, heldout = model_over(tmp_path), TokenSource.open(tmp_path / "heldout")
    prompts = fact_prompts(heldout, model.tokenizers, documents=3, context_tokens=64)
    seen: list[np.ndarray] = []
    judges = SimpleNamespace(
        picture=SimpleNamespace(
            digits=lambda picture: seen.append(picture) or (4, 2),
            features=lambda picture: np.array([picture.mean(), np.ptp(picture)]),
        ),
        picture_accuracy=Accuracy(1.0, 1.0),
        scans=np.array([[100.0, 200.0], [120.0, 220.0], [90.0, 250.0]]),
        speech_accuracy=Accuracy(1.0, 1.0),
    )
    sampling = Sampling(image_steps=2)
    (score,) = score_facts(model, {("text", "image"): prompts["text", "image"]}, judges, sampling).values()
    assert score.samples == len(seen) == 3
    assert score.distance is not None and min(score.distance) >= 0
    for picture in seen:
        assert (
            picture.shape == (PICTURE_PX, PICTURE_PX, 3)
            and picture.dtype == np.uint8
            and np.ptp(picture) > 50
        )


def test_data_that_states_no_digits_is_refused(tmp_path: Path, data: Path) -> None:
    write_tokenized_data(tmp_path)
    model, other = model_over(data), TokenSource.open(tmp_path / "heldout")
    with pytest.raises(ConfigError, match="0 of 5 documents with text and image state digits as the demo"):
        fact_prompts(other, model.tokenizers, documents=5, context_tokens=64)
    with pytest.raises(ConfigError, match="heldout: 40 utterances with a text beside them"):
        train_judges(model.tokenizers, TokenSource.open(data / "heldout"), other)


def test_lines_name_direction_chance_and_judge() -> None:
    score = FactScore(8, Accuracy(0.5, 0.75), Accuracy(0.0, 0.125), Accuracy(0.875, 1.0))
    assert describe_facts({("text", "image"): score}) == [
        "facts, text -> image: exact 0.500, per digit 0.750 of 8 samples (against another prompt: 0.000 and "
        "0.125; the judge itself: 0.875 and 1.000)"
    ]
    assert "read by a rule" in describe_facts({("image", "text"): replace(score, judge=None)})[0]
