"""Batches of documents with images as vectors, for tests of the model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data_pipeline.shards.vocabulary import VectorFormat, Vocabulary
from data_pipeline.stream.batch import Batch, make_batch
from pretrain.models.config import ModelConfig
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.models.noising import training_draw
from pretrain.models.vector_inputs import Draw, with_noise

FEATURES = 3
FORMAT = VectorFormat(features=FEATURES, dtype="float16", mean=0.25, std=0.5)
VOCABULARY = Vocabulary(sizes={"text": 30, "image": 1, "speech": 6}, vectors={"image": FORMAT})
TWO = Vocabulary(sizes={"text": 39, "image": 1}, vectors={"image": FORMAT})
"""Of text and images alone, with 40 ids."""

Document = Sequence[int | str]
"""Parts of a document: so many ids of text, "i4" an image of 4 vectors, "s3" 3 ids of speech."""

PACKED: tuple[tuple[Document, ...], ...] = (
    (("i2", 1), ("i3",), (1, "i1", "s1")),
    (("i2", "i3"), (1, "i1"), ("s1", "i2")),
)
"""Two sequences of packed documents: an image first, last, alone, several, of one vector, and none."""


def vector_config(towers: dict[str, str], **changes: Any) -> ModelConfig:
    """2 layers, d_model 16, 4 heads in 2 groups, 40 ids, images of 3 features. `image`: keys of
    vectors.image."""
    own = {"features": FEATURES, **changes.pop("image", {})}
    values = {
        "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden": 24,
        "context_tokens": 24, "vocab_tokens": 40, "init_std": 0.2, "vectors": {"image": own},
    }  # fmt: skip
    return ModelConfig.model_validate({**values, "towers": towers, **changes})


def document_ids(parts: Document, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """`<bos> parts <eos>`."""
    ids: list[int] = [vocabulary.bos]
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(7, vocabulary.sizes["text"], part).tolist()
            continue
        modality, count = {"i": "image", "s": "speech"}[part[0]], int(part[1:])
        opening, closing = vocabulary.delimiters(modality)
        codes = vocabulary.sizes[modality]
        first = vocabulary.first_code(modality)
        ids += [opening, *(first + rng.integers(0, codes, count)).tolist(), closing]
    return np.array([*ids, vocabulary.eos])


def vector_batch(
    sequences: Sequence[Sequence[Document]] = PACKED,
    *,
    vocabulary: Vocabulary = VOCABULARY,
    context_tokens: int = 24,
    seed: int = 0,
    counted: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Batch:
    """A batch of these documents with random ids and vectors. `counted`: which slots count, from a document's
    ids; None: all."""
    rng = np.random.default_rng(seed)
    ids = [[document_ids(parts, vocabulary, rng) for parts in documents] for documents in sequences]
    code = vocabulary.first_code("image")
    places = [sum(int((of[:-1] == code).sum()) for of in documents) for documents in ids]
    return make_batch(
        ids,
        sequence_tokens=context_tokens,
        vocabulary=vocabulary,
        vectors={"image": [rng.normal(0.25, 0.5, (n, FEATURES)).astype(np.float16) for n in places]},
        targets=None if counted is None else [[counted(of) for of in documents] for documents in ids],
    )


def draw_of(step: int = 0, first: int = 0) -> Draw:
    """What `with_noise` asks, of a step of a run of seed 7. `first`: as of vector_inputs_of."""
    return lambda images, image, size: training_draw(
        7, step, first + int(images.sequence[image]), int(images.position[image]), size
    )


def vector_inputs_of(
    batch: Batch, config: ModelConfig, *, step: int = 0, first: int = 0, scale: float = 1.0, **options: Any
) -> ModelInputs:
    """Inputs of a training step, with noise. `first`: number of the first sequence in the global batch."""
    inputs = build_inputs(batch, config, formats={"image": FORMAT}, **options)
    draw = draw_of(step, first)
    noised = {
        m: replace(with_noise(inputs.vectors[m], config.vectors[m], draw), scale=scale)
        for m in config.learned_vectors
    }
    return replace(inputs, vectors={**inputs.vectors, **noised})
