from typing import Any

import numpy as np
import pytest

from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.vocabulary import BOI, BOS, BOS_SPEECH, EOI, EOS, EOS_SPEECH, VectorFormat
from data_pipeline.tokenize.documents import DocumentEncoder
from data_pipeline.tokenize.limits import Limits
from data_pipeline.tokenize.media.pictures import MEASURED_PICTURES, PICTURES
from data_pipeline.tokenize.media.text import TEXT_MEDIUM
from data_pipeline.tokenize.raw import Part, SampleError, document_sample
from data_pipeline.tokenize.tokenizer import Medium, TokenizerConfig


class Letters:
    """A tokenizer of one code a byte, so that ids can be written down."""

    fingerprint, config = "letters", TokenizerConfig()

    def __init__(self, size: int, medium: Medium | None) -> None:
        self.size, self.medium = size, medium

    def read(self, data: Any) -> Any:
        if data in ("bad", b"bad"):
            raise SampleError("cannot be read")
        return data if isinstance(data, str) else np.frombuffer(data, np.uint8)

    def encode(self, content: Any) -> np.ndarray:
        return np.array([int(x) for x in content], np.int32)

    def decode(self, codes: np.ndarray) -> Any:
        return codes.astype(np.uint8)

    def save(self, folder: Any) -> None: ...


def encoder(*modalities: str) -> DocumentEncoder:
    sizes = {"text": 20, "image": 10, "speech": 5, "video": 4}
    media = {"text": TEXT_MEDIUM, "image": PICTURES, "video": PICTURES}
    names = modalities or ("text", "image", "speech")
    return DocumentEncoder({name: Letters(sizes[name], media.get(name)) for name in names}, Limits())


def encode(made: DocumentEncoder, sample: dict[str, bytes]) -> np.ndarray:
    """The ids of a sample, whose counts are added."""
    document = made.encode(sample)
    made.add(document)
    return document.ids


def sample(*parts: tuple[str, Any]) -> dict[str, bytes]:
    return document_sample([Part(*part) for part in parts], {"image": "png", "speech": "wav", "video": "npy"})


def test_a_document_is_its_parts_in_order_each_in_its_range() -> None:
    ids = encode(encoder(), sample(("text", "98"), ("speech", b"\4\0"), ("image", b"\7"), ("text", "7")))
    assert ids.tolist() == [BOS, 9, 8, BOS_SPEECH, 34, 30, EOS_SPEECH, BOI, 27, EOI, 7, EOS]
    assert ids.dtype == np.dtype("<u2")


def test_parts_without_loss_are_masked_with_their_delimiters() -> None:
    made = encoder()
    parts = [
        Part("text", "98", False),
        Part("image", b"\7", False),
        Part("text", "7"),
        Part("text", "", False),
    ]
    document = made.encode(document_sample(parts, {"image": "png"}))
    assert document.ids.tolist() == [BOS, 9, 8, BOI, 27, EOI, 7, EOS] and document.masked.tolist() == [[1, 6]]
    made.add(document)
    assert made.num_masked == 5
    with pytest.raises(SampleError, match="all its parts are context"):
        made.encode(document_sample(parts[:2], {"image": "png"}))


def test_a_further_modality_is_encoded_as_the_others_are() -> None:
    made = encoder("text", "image", "video")
    ids = encode(made, sample(("video", b"\3\0"), ("text", "9"), ("image", b"\7")))
    # video: delimiters 30 and 31, codes from 32 on
    assert ids.tolist() == [BOS, 30, 35, 32, 31, 9, BOI, 27, EOI, EOS]
    assert made.tokens == {"text": 7, "image": 1, "video": 2}
    assert [span.modality for span in read_spans(ids, made.vocabulary)] == ["video", "text", "image"]
    assert made.measured["pictures"] == made.measured["video.pictures"] == 1, "figures are kept apart"


class Pairs(Letters):
    """A tokenizer of vectors of two bytes each."""

    vectors = VectorFormat(features=2, dtype="uint8")

    def encode(self, content: Any) -> np.ndarray:
        return np.array([[x, x + 1] for x in content], np.uint8)


class Halves(Pairs):
    """A tokenizer that gives other vectors than it says."""

    vectors = VectorFormat(features=2, dtype="float16")


def test_vectors_go_beside_a_code_each() -> None:
    texts, pictures = Letters(20, None), Pairs(1, None)
    made = DocumentEncoder({"text": texts, "image": pictures, "clip": pictures}, Limits())
    assert made.vocabulary.sizes == {"text": 20, "image": 1, "clip": 3}
    parts = [Part("image", b"\4\6"), Part("text", "9"), Part("clip", b"\1", False), Part("image", b"\2")]
    document = made.encode(document_sample(parts, {"image": "png", "clip": "bin"}))
    assert document.ids.tolist() == [BOS, BOI, 20, 20, EOI, 9, 21, 23, 22, BOI, 20, EOI, EOS]
    assert {m: values.tolist() for m, values in document.vectors.items()} == {
        "image": [[4, 5], [6, 7], [2, 3]],
        "clip": [[1, 2]],
    }
    assert document.masked.tolist() == [[6, 9]] and document.tokens == {"text": 9, "image": 3, "clip": 1}
    text = made.encode(document_sample([Part("text", "9")], {}))
    assert text.vectors["image"].shape == (0, 2)
    with pytest.raises(SampleError, match=r"image becomes uint8 \[2, 2\], but .* is float16 \[n, 2\]"):
        DocumentEncoder({"text": texts, "image": Halves(1, None)}, Limits()).encode(
            document_sample(parts[:1], {"image": "png"})
        )


def test_the_reader_finds_the_parts_again() -> None:
    made = encoder()
    ids = encode(made, sample(("image", b"\1\2"), ("text", "9"), ("speech", b"\3")))
    found = [(part.modality, part.end - part.start) for part in read_spans(ids, made.vocabulary)]
    assert found == [("image", 4), ("text", 1), ("speech", 3)]


def test_tokens_are_counted_by_the_modality_of_their_ids() -> None:
    made = encoder()
    for _ in range(2):
        encode(made, sample(("image", b"\1\2"), ("text", "9")))
    # text: <bos>, <boi>, <eoi>, one letter, <eos>
    assert made.tokens == {"text": 10, "image": 4, "speech": 0}
    assert made.measured["text_bytes"] == 2 and made.measured["pictures"] == 2
    assert made.measured["decoded_squared_error"] == 0


def test_only_some_pictures_are_decoded_again() -> None:
    made = encoder()
    for _ in range(MEASURED_PICTURES + 5):
        encode(made, sample(("image", b"\1\2")))
    assert made.measured["pictures"] == MEASURED_PICTURES + 5
    assert made.measured["decoded_pictures"] == MEASURED_PICTURES


def test_an_unusable_sample_counts_for_nothing() -> None:
    made = encoder("text", "image")
    for parts, message in (
        ([("text", "9"), ("image", b"bad")], "cannot be read"),
        (
            [("text", "9"), ("speech", b"\1")],
            r"a part of speech, for which there is no tokenizer: add \[speech\]",
        ),
        ([("text", ""), ("text", "")], "all its parts are empty"),
    ):
        with pytest.raises(SampleError, match=message):
            encode(made, sample(*parts))
    assert not made.tokens and not made.measured
