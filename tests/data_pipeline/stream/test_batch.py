import numpy as np
import pytest

from data_pipeline.shards.vocabulary import BOI, BOS, EOI, EOS, PAD, VectorFormat, Vocabulary
from data_pipeline.stream.batch import make_batch

VOCABULARY = Vocabulary(sizes={"text": 20, "image": 5})
PICTURE = np.array([BOS, 9, BOI, 20, 24, EOI, EOS], np.uint16)
WORDS = np.array([BOS, 10, EOS], np.uint16)


def test_documents_lie_one_after_another_then_padding() -> None:
    batch = make_batch(
        [[PICTURE, WORDS], [WORDS]],
        sequence_tokens=10,
        vocabulary=VOCABULARY,
        samples=[["a/1", "a/2"], ["a/2"]],
    )
    assert batch.num_sequences == 2 and batch.sequence_tokens == 10
    assert batch.input_ids.tolist() == [
        [BOS, 9, BOI, 20, 24, EOI, BOS, 10, PAD, PAD],
        [BOS, 10] + [PAD] * 8,
    ]
    assert batch.target_ids.tolist() == [
        [9, BOI, 20, 24, EOI, EOS, 10, EOS, PAD, PAD],
        [10, EOS] + [PAD] * 8,
    ]
    assert batch.document_ids.tolist() == [[0] * 6 + [1] * 2 + [-1] * 2, [0] * 2 + [-1] * 8]
    assert batch.loss_weights.tolist() == [[1.0] * 8 + [0.0] * 2, [1.0] * 2 + [0.0] * 8]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1]
    assert batch.positions[1, :2].tolist() == [0, 1]
    assert batch.input_modality[0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert batch.input_special[0].tolist() == [1, 0, 1, 0, 0, 1, 1, 0, 1, 1]
    assert batch.target_modality[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert batch.samples == (("a/1", "a/2"), ("a/2",))
    kinds = {name: value.dtype for name, value in vars(batch).items() if name not in ("samples", "vectors")}
    assert kinds == {
        "input_ids": np.int32,
        "target_ids": np.int32,
        "loss_weights": np.float32,
        "positions": np.int32,
        "document_ids": np.int32,
        "input_modality": np.uint8,
        "input_special": np.bool_,
        "target_modality": np.uint8,
    }


def test_targets_that_do_not_count_have_no_weight() -> None:
    counted = np.array([True, False, False, True, True, False])
    batch = make_batch(
        [[WORDS, PICTURE]], sequence_tokens=10, vocabulary=VOCABULARY, targets=[[None, counted]]
    )
    assert batch.loss_weights.tolist() == [[1, 1, 1, 0, 0, 1, 1, 0, 0, 0]]
    plain = make_batch([[WORDS, PICTURE]], sequence_tokens=10, vocabulary=VOCABULARY)
    assert (batch.input_ids == plain.input_ids).all() and (batch.target_ids == plain.target_ids).all()


def test_a_sequence_may_be_full_or_empty() -> None:
    batch = make_batch([[PICTURE], []], sequence_tokens=6, vocabulary=VOCABULARY)
    assert (batch.document_ids[0] == 0).all()
    assert (batch.document_ids[1] == -1).all() and not batch.loss_weights[1].any()
    assert batch.samples == ((), ())


def test_rows_are_views() -> None:
    batch = make_batch([[PICTURE], [WORDS]], sequence_tokens=6, vocabulary=VOCABULARY)
    second = batch.rows(1, 2)
    assert second.num_sequences == 1 and second.target_ids[0, 1] == EOS
    assert np.shares_memory(second.input_ids, batch.input_ids)


@pytest.mark.parametrize("documents", [[PICTURE, WORDS], [WORDS[:1]]])
def test_what_does_not_fit_is_an_error(documents: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="sequence 0: document"):
        make_batch([documents], sequence_tokens=7, vocabulary=VOCABULARY)


OF_VECTORS = Vocabulary(
    sizes={"text": 20, "image": 1}, vectors={"image": VectorFormat(features=2, dtype="uint8")}
)
PATCHES = np.array([BOS, BOI, 20, 20, EOI, EOS], np.uint16)


def test_vectors_lie_beside_the_ids_of_their_sequence() -> None:
    values = [np.array([[1, 2], [3, 4]], np.uint8), np.zeros((0, 2), np.uint8), np.full((4, 2), 7, np.uint8)]
    batch = make_batch(
        [[WORDS, PATCHES], [WORDS], [PATCHES, PATCHES]],
        sequence_tokens=10,
        vocabulary=OF_VECTORS,
        vectors={"image": values},
    )
    assert batch.vectors["image"].first.tolist() == [0, 2, 2, 6]
    of_last = batch.rows(1, 3).vectors["image"]
    assert of_last.first.tolist() == [0, 0, 4] and (of_last.values == 7).all()
    assert np.shares_memory(of_last.values, batch.vectors["image"].values)
    values[0][0, 0] = 9
    other = make_batch(
        [[WORDS, PATCHES], [WORDS], [PATCHES, PATCHES]],
        sequence_tokens=10,
        vocabulary=OF_VECTORS,
        vectors={"image": values},
    )
    assert other.digest != batch.digest
    with pytest.raises(ValueError, match=r"vectors of image: \[1\] in the sequences, which have \[2\]"):
        make_batch([[PATCHES]], sequence_tokens=6, vocabulary=OF_VECTORS, vectors={"image": [values[0][:1]]})
