"""Token shards of random documents with realistic shapes: for benchmarks and tests, never for training."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.files.atomic import write_json
from data_pipeline.shards.loss_mask import MASKED_SUFFIX, to_bytes
from data_pipeline.shards.tar import FORMAT, MANIFEST, TOKENS_SUFFIX, write_shard
from data_pipeline.shards.vectors import VECTORS_SUFFIX, num_vectors
from data_pipeline.shards.vectors import to_bytes as vectors_to_bytes
from data_pipeline.shards.vocabulary import SPECIAL_TOKENS, TEXT, Vocabulary


def random_document(
    rng: np.random.Generator, vocabulary: Vocabulary, spans: Sequence[tuple[str, int]]
) -> np.ndarray:
    """A document `<bos> spans... <eos>` of random ids; `spans` are (modality, tokens without delimiters)."""
    pieces: list[np.ndarray] = [np.array([vocabulary.bos])]
    for modality, tokens in spans:
        start = len(SPECIAL_TOKENS) if modality == TEXT else vocabulary.first_code(modality)
        end = vocabulary.start(modality) + vocabulary.sizes[modality]
        ids = rng.integers(start, end, tokens)
        if modality != TEXT:
            opening, closing = vocabulary.delimiters(modality)
            ids = np.concatenate([[opening], ids, [closing]])
        pieces.append(ids)
    return np.concatenate([*pieces, [vocabulary.eos]]).astype(vocabulary.dtype)


def random_documents(
    vocabulary: Vocabulary, num_documents: int, seed: int, *, median_text_tokens: int, image_tokens: int
) -> Iterator[np.ndarray]:
    """Documents of text of log-normal length; half of them hold spans of other modalities between texts.

    Spans of the second modality of the vocabulary all have `image_tokens` tokens, as images have; those of
    further modalities have 1 to twice as many, as utterances have.
    """
    rng = np.random.default_rng(seed)
    others = vocabulary.modalities[1:]

    def text() -> tuple[str, int]:
        return TEXT, 1 + int(rng.lognormal(np.log(median_text_tokens), 1.0))

    for _ in range(num_documents):
        spans = [text()]
        if others and rng.random() < 0.5:
            for _ in range(int(rng.integers(1, 3))):
                modality = str(rng.choice(others))
                varied = modality != others[0]
                tokens = int(rng.integers(1, 2 * image_tokens)) if varied else image_tokens
                spans += [(modality, tokens), (TEXT, 1 + int(rng.integers(0, median_text_tokens)))]
        yield random_document(rng, vocabulary, spans)


def random_vectors(
    rng: np.random.Generator, ids: np.ndarray, vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """Vectors for a document: uniform bytes, or normal numbers, by the modality's storage dtype."""
    return {
        modality: of.stored(rng.standard_normal((n, of.features)))
        if (of := vocabulary.vectors[modality]).dtype == "float16"
        else rng.integers(0, 256, (n, of.features)).astype(of.storage)
        for modality, n in num_vectors(ids, vocabulary).items()
    }


def write_token_folder(
    folder: Path,
    documents: Sequence[np.ndarray],
    vocabulary: Vocabulary,
    *,
    documents_per_shard: int,
    fingerprint: str = "synthetic",
    masked: Mapping[int, np.ndarray] | None = None,
    vectors: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> Path:
    """Write documents as token shards with a manifest, as `motley tokenize` would. Returns `folder`.

    `masked`: number of a document -> its ranges of ids that are no targets (loss_mask.py). `vectors`: those
    of each document (vectors.py); None: random ones, which its number decides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = [_sample(i, ids, vocabulary, masked or {}, vectors) for i, ids in enumerate(documents)]
    shards = [
        write_shard(folder / f"tokens-{number:05d}.tar", samples[first : first + documents_per_shard])
        for number, first in enumerate(range(0, len(documents), documents_per_shard))
    ]
    counts = np.zeros(len(vocabulary.modalities), np.int64)
    for ids in documents:
        counts += np.bincount(vocabulary.modality_of(ids), minlength=len(counts))
    manifest = {
        "format": FORMAT,
        **vocabulary.manifest_values(),
        "tokenizers": {name: {"fingerprint": f"{fingerprint}-{name}"} for name in vocabulary.modalities},
        "num_documents": len(documents),
        "tokens": dict(zip(vocabulary.modalities, counts.tolist(), strict=True)),
        "shards": shards,
        "skipped": [],
        "source": {"synthetic": True},
    }
    write_json(folder / MANIFEST, manifest)
    return folder


def _sample(
    number: int,
    ids: np.ndarray,
    vocabulary: Vocabulary,
    masked: Mapping[int, np.ndarray],
    vectors: Sequence[Mapping[str, np.ndarray]] | None,
) -> tuple[str, dict[str, bytes]]:
    """The key of a document in a token shard, and its members by suffix."""
    own = (
        random_vectors(np.random.default_rng(number), ids, vocabulary) if vectors is None else vectors[number]
    )
    members = {
        TOKENS_SUFFIX: ids.astype(vocabulary.dtype).tobytes(),
        MASKED_SUFFIX: to_bytes(masked[number]) if number in masked else b"",
        VECTORS_SUFFIX: vectors_to_bytes(own, vocabulary),
    }
    return f"{number:09d}", {suffix: content for suffix, content in members.items() if content}
