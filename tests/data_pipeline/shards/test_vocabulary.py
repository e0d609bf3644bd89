import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline.shards.vocabulary import BOI, EOS_SPEECH, VectorFormat, Vocabulary

SIZES = {"text": 100, "image": 20, "speech": 10}


def test_ranges_follow_each_other_and_name_the_modality() -> None:
    vocabulary = Vocabulary(sizes=SIZES)
    assert [vocabulary.start(m) for m in vocabulary.modalities] == [0, 100, 120]
    assert vocabulary.size == 130
    ids = np.array([[0, 99, 100], [119, 120, 129]])
    assert vocabulary.modality_of(ids).tolist() == [[0, 0, 1], [1, 2, 2]]
    assert vocabulary.modality_of(ids).dtype == np.uint8


def test_delimiters_belong_to_text() -> None:
    assert Vocabulary(sizes=SIZES).modality_of(np.array([BOI, EOS_SPEECH])).tolist() == [0, 0]


def test_a_further_modality_brings_its_delimiters_and_moves_no_id() -> None:
    before, after = (
        Vocabulary(sizes=SIZES),
        Vocabulary(sizes={**SIZES, "video": Vocabulary.size_of("video", 4)}),
    )
    assert after.size == 136 and after.delimiters("video") == (130, 131) and after.first_code("video") == 132
    for name in SIZES:
        assert before.start(name) == after.start(name) == after.first_code(name)
    assert [after.delimiters(name) for name in ("image", "speech")] == [(3, 4), (5, 6)]
    ids = np.arange(136)
    assert after.modality_of(ids[:130]).tolist() == before.modality_of(ids[:130]).tolist()
    assert after.modality_of(ids[130:]).tolist() == [0, 0, 3, 3, 3, 3]
    assert np.flatnonzero(after.is_special(ids)).tolist() == [0, 1, 2, 3, 4, 5, 6, 130, 131]


def test_id_outside_is_an_error() -> None:
    with pytest.raises(IndexError):
        Vocabulary(sizes=SIZES).modality_of(np.array([130]))


@pytest.mark.parametrize("text, dtype", [(65_536 - 30, "<u2"), (65_537 - 30, "<u4")])
def test_storage_is_the_smallest_that_holds_every_id(text: int, dtype: str) -> None:
    assert Vocabulary(sizes={**SIZES, "text": text}).dtype == np.dtype(dtype)


@pytest.mark.parametrize("sizes", [{"image": 1, "text": 1}, {}, {"text": 9, "smell": 2}, {"text": 0}])
def test_illegal_vocabularies_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Vocabulary(sizes=sizes)


def test_a_modality_of_vectors_has_one_code_and_travels_through_a_manifest() -> None:
    pixels = VectorFormat(features=12, dtype="uint8", mean=100.0, std=50.0)
    vocabulary = Vocabulary(
        sizes={"text": 9, "image": 1, "video": 3}, vectors={"image": pixels, "video": pixels}
    )
    assert Vocabulary(**Vocabulary.values_of(vocabulary.manifest_values())) == vocabulary
    assert vocabulary.first_code("image") == 9 and vocabulary.first_code("video") == 12
    assert "vectors" not in Vocabulary(sizes=SIZES).manifest_values()
    with pytest.raises(ValidationError, match="vectors of image, which has 2 ids"):
        Vocabulary(sizes={"text": 9, "image": 2}, vectors={"image": pixels})
    with pytest.raises(ValidationError, match="not in the order of the vocabulary"):
        Vocabulary(sizes=vocabulary.sizes, vectors=dict(reversed(vocabulary.vectors.items())))
    with pytest.raises(ValidationError, match="vectors of text"):
        Vocabulary(sizes={"text": 9}, vectors={"text": pixels})


def test_pixels_come_back_from_what_a_model_sees() -> None:
    pixels = VectorFormat(features=256, dtype="uint8", mean=100.0, std=50.0)
    stored = np.arange(256, dtype=np.uint8)[None]
    seen = pixels.normalised(stored)
    assert seen.dtype == np.float32 and seen[0, 100] == 0 and seen[0, 150] == 1
    assert (pixels.stored(seen) == stored).all() and pixels.stored(seen).dtype == np.uint8
    assert pixels.stored(np.array([-9.0, 9.0])).tolist() == [0, 255]
