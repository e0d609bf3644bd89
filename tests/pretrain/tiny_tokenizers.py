"""Real tokenizers of all three modalities that fit in a fraction of a second, and data of their ids."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_pipeline.shards.synthetic import random_documents, write_token_folder
from data_pipeline.shards.vocabulary import BOI, BOS, BOS_SPEECH, EOI, EOS, EOS_SPEECH, Vocabulary
from data_pipeline.tokenize.kinds.bpe import BpeConfig, fit_bpe
from data_pipeline.tokenize.kinds.log_mel_kmeans import UnitConfig, fit_units
from data_pipeline.tokenize.kinds.patch_kmeans import PatchConfig, PatchTokenizer
from data_pipeline.tokenize.kinds.patches import PixelConfig, PixelPatches
from data_pipeline.tokenize.registry import default_kind, save_tokenizer
from data_pipeline.tokenize.tokenizer import Tokenizer
from data_pipeline.tokenize.tokenizer_set import TOKENIZERS, vocabulary_of

PICTURE_PX, PATCH_PX = 8, 4
SECOND = 16_000


def tone(hertz: float, seconds: float = 0.4) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * SECOND)) / SECOND).astype(np.float32)


def write_tiny_tokenizers(folder: Path, *, vectors: bool = False) -> dict[str, Tokenizer]:
    """Folders of tokenizers in `folder`: pictures have 4 codes, each of one grey, or 4 `vectors` of pixels;
    units are tones."""
    greys = np.repeat(np.arange(8, dtype=np.uint8) * 30, 3 * PATCH_PX**2).reshape(8, -1)
    image = PatchConfig(size_px=PICTURE_PX, patch_px=PATCH_PX, num_codes=8, num_verbatim=0)
    texts = [f"A {a} {b} left of a red {a}." for a in range(30) for b in ("blue", "green")]
    tokenizers: dict[str, Tokenizer] = {
        "text": fit_bpe(texts, BpeConfig(vocab_size=512)),
        "image": PatchTokenizer(image, greys),
        "speech": fit_units([tone(220), tone(440), tone(880)], UnitConfig(num_units=4), 0),
    }
    if vectors:
        pixels = PixelConfig(size_px=PICTURE_PX, patch_px=PATCH_PX)
        tokenizers["image"] = PixelPatches(pixels, mean=120.0, std=60.0)
    for name, tokenizer in tokenizers.items():
        kind = "patches" if name == "image" and vectors else default_kind(name)
        assert kind is not None
        save_tokenizer(folder / name, name, kind, tokenizer)
    return tokenizers


def write_tokenized_data(folder: Path, *, vectors: bool = False) -> Vocabulary:
    """folder/train, folder/heldout and folder/tokenizers, as `motley tokenize` leaves them; random ids, and
    random pixels where pictures are `vectors`."""
    tokenizers = write_tiny_tokenizers(folder / TOKENIZERS, vectors=vectors)
    vocabulary = vocabulary_of(tokenizers)
    for name, count, seed in (("train", 100, 1), ("heldout", 30, 2)):
        made = random_documents(vocabulary, count, seed, median_text_tokens=6, image_tokens=4)
        _write_data(folder / name, [ids for ids in made if len(ids) < 60], tokenizers)
    return vocabulary


def write_demo_like_data(folder: Path, *, vectors: bool = False) -> Vocabulary:
    """The same of documents that state digits as the demo corpus does, in a few tokens: a caption and a
    sentence, a picture of noise, and an utterance in which the words of digits are runs of two units."""
    tokenizers = write_tiny_tokenizers(folder / TOKENIZERS, vectors=vectors)
    vocabulary = vocabulary_of(tokenizers)
    for name, count in (("train", 220), ("heldout", 40)):
        random = np.random.default_rng(count)
        documents = []
        for _ in range(count):
            a, b = random.integers(0, 10, 2)
            text = tokenizers["text"].encode(f"red {a}, blue {b}\n{a} and {b}")
            picture = random.integers(0, tokenizers["image"].size, 4) + vocabulary.first_code("image")
            word_units = np.array([3, a // 4, a % 4, 3, b // 4, b % 4]) + vocabulary.first_code("speech")
            parts = [text, [BOI, *picture, EOI], [BOS_SPEECH, *word_units, EOS_SPEECH]]
            order = random.permutation(3)
            documents.append(np.concatenate([[BOS], *(parts[i] for i in order), [EOS]]).astype(np.int64))
        _write_data(folder / name, documents, tokenizers)
    return vocabulary


def _write_data(folder: Path, documents: list[np.ndarray], tokenizers: Mapping[str, Tokenizer]) -> None:
    """Token shards whose manifest has the fingerprints of the tokenizers."""
    write_token_folder(folder, documents, vocabulary_of(tokenizers), documents_per_shard=40)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizers"] = {m: {"fingerprint": t.fingerprint} for m, t in tokenizers.items()}
    path.write_text(json.dumps(manifest))
