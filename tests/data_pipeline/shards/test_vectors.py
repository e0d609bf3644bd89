from itertools import pairwise

import numpy as np
import pytest

from data_pipeline.shards.vectors import from_bytes, joined, num_bytes, of_sequences, to_bytes, within
from data_pipeline.shards.vocabulary import BOI, BOS, EOI, EOS, VectorFormat, Vocabulary

VOCABULARY = Vocabulary(
    sizes={"text": 20, "image": 1, "speech": 5, "video": 3},
    vectors={
        "image": VectorFormat(features=3, dtype="uint8"),
        "video": VectorFormat(features=2, dtype="float16"),
    },
)
IMAGE, VIDEO = VOCABULARY.first_code("image"), VOCABULARY.first_code("video")
OPEN, CLOSE = VOCABULARY.delimiters("video")
IDS = np.array(
    [BOS, OPEN, VIDEO, CLOSE, BOI, IMAGE, IMAGE, EOI, 9, OPEN, VIDEO, VIDEO, CLOSE, EOS], np.uint16
)
VECTORS = {
    "image": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "video": np.arange(6, dtype=np.float16).reshape(3, 2) / 4,
}


def equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(
        np.array_equal(a, theirs[m]) and a.dtype == theirs[m].dtype for m, a in ours.items()
    )


def test_a_member_holds_one_modality_after_another() -> None:
    content = to_bytes(VECTORS, VOCABULARY)
    assert content == VECTORS["image"].tobytes() + VECTORS["video"].tobytes()
    assert len(content) == num_bytes(IDS, VOCABULARY) == 2 * 3 + 3 * 4
    assert equal(from_bytes(content, IDS, VOCABULARY), VECTORS)
    with pytest.raises(ValueError, match=r"17 bytes, but the ids have \{'image': 2, 'video': 3\} v.*: 18 b"):
        from_bytes(content[1:], IDS, VOCABULARY)
    assert num_bytes(IDS, Vocabulary(sizes=VOCABULARY.sizes)) == 0


def test_pieces_have_the_vectors_of_their_ids_and_make_the_whole_again() -> None:
    borders = [0, 4, 8, 9, 14]
    pieces = [within(VECTORS, IDS, a, b, VOCABULARY) for a, b in pairwise(borders)]
    assert [[len(piece[m]) for m in ("image", "video")] for piece in pieces] == [
        [0, 1],
        [2, 0],
        [0, 0],
        [0, 2],
    ]
    assert equal(joined(pieces, VOCABULARY), VECTORS) and np.shares_memory(
        pieces[1]["image"], VECTORS["image"]
    )
    of = of_sequences([pieces[:2], [], pieces[3:]], VOCABULARY)
    assert [len(values) for values in of["video"]] == [1, 0, 2]
    assert [values.shape for values in of["image"]] == [(2, 3), (0, 3), (0, 3)]
    assert of["video"][2].tolist() == VECTORS["video"][1:].tolist()
