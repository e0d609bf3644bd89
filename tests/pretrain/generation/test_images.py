"""Images as vectors behind prompts: passes on the cache compute what passes over the whole texts compute."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.vocabulary import VectorFormat
from pretrain.generation import images
from pretrain.generation.continuation import continue_prompts
from pretrain.generation.decoding import pass_inputs, read_tokens
from pretrain.generation.denoise import Denoising, denoise
from pretrain.generation.grammar import Grammar
from pretrain.generation.images import denoising_of, write_images
from pretrain.generation.key_cache import KeyCache
from pretrain.generation.sampling import Sampling, uniforms
from pretrain.models.decoder import Decoder
from pretrain.models.routing_state import RoutingState
from pretrain.models.vectors import VectorAdapters
from tests.numerics.test_naive_depth import perturbed
from tests.pretrain.models.random_batch import DENSE, MOT
from tests.pretrain.models.vector_batch import FEATURES, VOCABULARY, document_ids, vector_config

STATE, IMAGE = RoutingState(), "image"
PARTS = ((3,), (2, "i4", 1), ("s3", "i2", "i4"))
"""Prompts: a text, an image between texts, and two images in a row. An image of 4 is written behind them."""
EXPERTS = {"image": {"num_experts": 3, "routing": "token_choice", "top_k": 2}}
MODELS = {
    "dense": (DENSE, {}),
    "mot, v": (MOT, {"image": {"prediction": "v"}}),
    "mot, flow": (MOT, {"image": {"objective": "flow", "shift": 3.0}}),
    "causal": (MOT, {"image": {"bidirectional": False}}),
    "experts": (MOT, {"experts": EXPERTS}),
}


def prompts() -> list[Document]:
    rng = np.random.default_rng(1)
    found = []
    for parts in PARTS:
        ids = document_ids(parts, VOCABULARY, rng)[:-1]
        count = int((ids == VOCABULARY.first_code(IMAGE)).sum())
        found.append(Document(ids, {IMAGE: rng.normal(0.25, 0.5, (count, FEATURES)).astype(np.float16)}))
    return found


def cached(decoder: Decoder, found: list[Document]) -> KeyCache:
    cache = KeyCache.empty(len(found))
    read_tokens(decoder, cache, range(len(found)), found, VOCABULARY, STATE)
    return cache


def behind(prompt: Document, vectors: np.ndarray) -> Document:
    """A document that goes on with an image, which is not yet closed."""
    opening, _ = VOCABULARY.delimiters(IMAGE)
    ids = np.concatenate([prompt.ids, [opening], [VOCABULARY.first_code(IMAGE)] * len(vectors)])
    return Document(ids, {IMAGE: np.concatenate([prompt.vectors[IMAGE], vectors])})


@torch.no_grad()
def predicted(decoder: Decoder, text: Document, vectors: np.ndarray, time: float) -> np.ndarray:
    """What a pass without a cache over the whole text predicts of its last image, if that were `vectors` at
    this time. All other images are clean."""
    inputs = pass_inputs([text], [0], decoder.config, VOCABULARY, STATE)
    own = inputs.vectors[IMAGE]
    values, times = own.values.double(), own.times.clone()
    values[-len(vectors) :], times[-1] = torch.from_numpy(vectors), time
    inputs = replace(inputs, vectors={IMAGE: replace(own, values=values, times=times)})
    adapters = decoder.vectors[IMAGE]
    assert isinstance(adapters, VectorAdapters)
    return adapters.predict(decoder.hidden(inputs)[0], inputs.vectors[IMAGE])[-len(vectors) :].numpy()


Seen = list[tuple[np.ndarray, float, np.ndarray]]


def note_predictions(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """(noised vectors, time, prediction) of every pass from now on."""
    seen: Seen = []

    def noting(how: Denoising, predict: Callable[..., np.ndarray], start: np.ndarray, fresh: Any) -> Any:
        def note(vectors: np.ndarray, time: float) -> np.ndarray:
            seen.append((vectors, time, predict(vectors, time)))
            return seen[-1][2]

        return denoise(how, note, start, fresh)

    monkeypatch.setattr(images, "denoise", noting)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_cached_passes_equal_passes_over_the_whole_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of denoising, side by side for three prompts, against a pass per text; and what is read
    behind the image. Relative to the largest number; measured: 1.1e-15."""
    towers, changes = MODELS[name]
    config = vector_config(towers, **changes)
    decoder, found, seen = perturbed(config).double().eval(), prompts(), note_predictions(monkeypatch)
    (how,) = denoising_of(config, VOCABULARY, Sampling(image_steps=5)).values()
    cache = cached(decoder, found)
    generators = [uniforms(1, 0, number) for number in range(len(found))]
    written = write_images(decoder, cache, range(len(found)), IMAGE, 4, how, generators, VOCABULARY, STATE)
    assert len(seen) == 5
    for vectors, time, predictions in seen:
        for prompt, own, prediction in zip(found, vectors, predictions, strict=True):
            expected = predicted(decoder, behind(prompt, np.zeros((4, FEATURES))), own, time)
            scale = np.abs(expected).max()
            assert scale > 0.1 and np.abs(prediction - expected).max() < 1e-10 * scale
    last = [Document(np.array([VOCABULARY.delimiters(IMAGE)[1]]))] * len(found)
    logits, _ = read_tokens(decoder, cache, range(len(found)), last, VOCABULARY, STATE)
    for row, prompt, image in zip(logits, found, written, strict=True):
        text = behind(prompt, image)
        whole = Document(np.append(text.ids, last[0].ids), text.vectors)
        expected, _ = read_tokens(decoder, KeyCache.empty(1), [0], [whole], VOCABULARY, STATE)
        assert float((row - expected[0]).abs().max() / expected.abs().max()) < 1e-10


GRAMMAR = Grammar(VOCABULARY, {IMAGE: 4})


def test_free_samples_hold_whole_images_and_depend_on_seed_and_number_alone() -> None:
    """Samples with images at different places are written side by side, in any groups."""
    decoder = perturbed(vector_config(MOT)).double().eval()
    sampling = Sampling(image_steps=3)

    def continued(sequences_at_once: int, sampling: Sampling = sampling) -> list[Document]:
        found = continue_prompts(
            decoder, prompts(), GRAMMAR, sampling, STATE, samples=4, sequences_at_once=sequences_at_once
        )
        return [sample for of_prompt in found for sample in of_prompt]

    together, apart = continued(12), continued(8)
    code, holding = VOCABULARY.first_code(IMAGE), 0
    for prompt, sample, other in zip(np.repeat(np.arange(3), 4), together, apart, strict=True):
        assert sample.ids.tolist() == other.ids.tolist()
        vectors = sample.vectors.get(IMAGE, np.zeros((0, FEATURES), np.float16))
        assert vectors.dtype == np.float16 and len(vectors) == (sample.ids == code).sum()
        # Sums of batched products run in another order; measured: equal bits.
        np.testing.assert_allclose(vectors, other.vectors.get(IMAGE, vectors), atol=2e-3)
        whole = np.concatenate([prompts()[prompt].ids, sample.ids])
        document = whole if whole[-1] == VOCABULARY.eos else np.append(whole, VOCABULARY.eos)
        spans = [
            span for span in read_spans(document, VOCABULARY) if span.start >= len(whole) - len(sample.ids)
        ]
        drawn = [span for span in spans if span.modality == IMAGE]
        assert {span.end - span.start for span in drawn} <= {6} and len(drawn) * 4 == len(vectors)
        holding += len(drawn)
    assert holding > 2
    others = continued(12, Sampling(image_steps=3, seed=2))
    assert [sample.ids.tolist() for sample in others] != [sample.ids.tolist() for sample in together]


def test_vectors_without_an_objective_are_not_written() -> None:
    decoder = Decoder(vector_config(MOT, image={"objective": "none"}))
    grammar = replace(GRAMMAR, context_only=frozenset({IMAGE}))
    found = continue_prompts(decoder, prompts(), grammar, Sampling(), STATE, samples=20)
    ids = np.concatenate([sample.ids for of_prompt in found for sample in of_prompt])
    assert len(ids) > 100 and not np.isin(ids, VOCABULARY.delimiters(IMAGE)).any()


def test_what_does_not_go_with_the_objective_is_refused() -> None:
    config = vector_config(MOT)
    for changes, sampling, message in (
        (
            {},
            Sampling(sampler="euler"),
            "--sampler euler: the model learned image by diffusion, which",
        ),
        (
            {"objective": "flow"},
            Sampling(sampler="ddim"),
            "by flow, which goes with euler; name one",
        ),
        ({}, Sampling(image_steps=1001), "--image-steps 1001: the model learned 1000 steps of diffusion"),
        ({"objective": "none"}, Sampling(sampler="ddim"), "--sampler ddim: is for images that are vectors"),
        ({"objective": "none"}, Sampling(image_steps=9), "--image-steps 9: is for images that are vectors"),
    ):
        with pytest.raises(ConfigError, match=message):
            denoising_of(vector_config(MOT, image=changes), VOCABULARY, sampling)
    assert len(denoising_of(config, VOCABULARY, Sampling(image_steps=1000))[IMAGE].times) == 1000


def test_clean_values_of_pixels_have_bounds() -> None:
    pixels = VectorFormat(features=FEATURES, dtype="uint8", mean=51.0, std=102.0)
    vocabulary = VOCABULARY.model_copy(update={"vectors": {IMAGE: pixels}})
    config = vector_config(MOT)
    assert denoising_of(config, vocabulary, Sampling())[IMAGE].bounds == (-0.5, 2.0)
    assert denoising_of(config, VOCABULARY, Sampling())[IMAGE].bounds is None
