from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards.index import Document, TokenSource
from data_pipeline.shards.synthetic import write_token_folder
from data_pipeline.shards.vocabulary import (
    BOI,
    BOS,
    BOS_SPEECH,
    EOI,
    EOS,
    EOS_SPEECH,
    VectorFormat,
    Vocabulary,
)
from pretrain.evaluation.documents import (
    Pair,
    Part,
    fingerprint,
    first_texts,
    heldout_texts,
    nearest_parts,
    pack_texts,
    pair_text,
    pairs,
)
from tests.pretrain.tiny_data import CONTEXT_TOKENS, VOCABULARY, write_tiny_data, write_tokens

IMAGE, SPEECH = VOCABULARY.start("image"), VOCABULARY.start("speech")


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> TokenSource:
    folder = tmp_path_factory.mktemp("tokens")
    write_tiny_data(folder)
    return TokenSource.open(folder / "heldout")


def test_heldout_documents_are_whole_once_and_fill_the_sequences_asked_for(heldout: TokenSource):
    texts = heldout_texts(heldout, num_sequences=6, context_tokens=CONTEXT_TOKENS)
    sequences = pack_texts(texts, CONTEXT_TOKENS)
    assert 5 <= len(sequences) <= 6
    assert all(sum(len(text.weights) for text in texts) <= CONTEXT_TOKENS for texts in sequences)
    slots = sum(len(text.weights) for texts in sequences for text in texts)
    assert slots > 0.8 * 6 * CONTEXT_TOKENS
    assert len({text.name for text in texts}) == len(texts)
    for text in texts:
        assert text.ids[0] == BOS and text.ids[-1] == EOS
        assert text.weights.tolist() == [1.0] * (len(text.ids) - 1)


def test_a_small_heldout_set_is_read_once_and_not_repeated(heldout: TokenSource):
    texts = heldout_texts(heldout, num_sequences=1000, context_tokens=CONTEXT_TOKENS)
    assert sorted(text.name for text in texts) == sorted(
        heldout.name(d) for d in range(heldout.num_documents)
    )


def test_a_long_document_is_cut_into_pieces_that_predict_each_id_once(tmp_path: Path):
    ids = np.concatenate([[BOS], np.full(100, 9), [BOI], IMAGE + np.arange(10), [EOI], [EOS]])
    write_tokens(tmp_path / "long", [ids])
    texts = heldout_texts(TokenSource.open(tmp_path / "long"), num_sequences=3, context_tokens=64)
    assert len(texts) == 2
    assert np.concatenate([text.ids[1:] for text in texts]).tolist() == ids[1:].tolist()


def test_a_pair_is_of_one_document_and_its_foreign_condition_is_of_another(heldout: TokenSource):
    found = pairs(heldout, num_documents=8, context_tokens=CONTEXT_TOKENS)
    assert set(found) == {(a, b) for a in VOCABULARY.modalities for b in VOCABULARY.modalities if a != b}
    by_name = {heldout.name(d): heldout.document(d) for d in range(heldout.num_documents)}
    for (a, b), listed in found.items():
        assert 2 <= len(listed) <= 8
        for pair in listed:
            parts = nearest_parts(by_name[pair.name], VOCABULARY, a, b)
            assert parts is not None and pair.counted.all()
            assert pair.condition.equals(parts.condition)
            assert pair.target.equals(parts.target)
            assert not pair.foreign.equals(pair.condition)
            owners = [
                name
                for name, content in by_name.items()
                if (parts := nearest_parts(content, VOCABULARY, a, b)) and parts[0].equals(pair.foreign)
            ]
            assert owners and pair.name not in owners


def test_the_fingerprint_is_of_every_id_that_is_read(tmp_path: Path, heldout: TokenSource):
    def of(source: TokenSource, num_documents: int = 8) -> str:
        texts = heldout_texts(source, num_sequences=6, context_tokens=CONTEXT_TOKENS)
        return fingerprint(texts, pairs(source, num_documents=num_documents, context_tokens=CONTEXT_TOKENS))

    documents = [heldout.read(d).copy() for d in range(heldout.num_documents)]
    write_tokens(tmp_path / "copy", documents)
    assert of(TokenSource.open(tmp_path / "copy")) == of(heldout) != of(heldout, num_documents=7)
    texts = heldout_texts(heldout, num_sequences=6, context_tokens=CONTEXT_TOKENS)
    changed = texts[3].ids.copy()
    changed[1] += 1
    texts[3] = texts[3]._replace(ids=changed)
    assert fingerprint(texts, {}) != fingerprint(
        heldout_texts(heldout, num_sequences=6, context_tokens=CONTEXT_TOKENS), {}
    )


def test_a_direction_without_two_documents_is_left_out(tmp_path: Path):
    speech = np.array([BOS_SPEECH, SPEECH, SPEECH + 1, EOS_SPEECH])
    image = np.array([BOI, IMAGE, EOI])
    documents = [np.concatenate([[BOS], [8, 9 + i], image, [EOS]]) for i in range(3)]
    documents.append(np.concatenate([[BOS], [8, 9], speech, [EOS]]))
    write_tokens(tmp_path / "few", documents)
    found = pairs(TokenSource.open(tmp_path / "few"), num_documents=4, context_tokens=64)
    # The images are all alike, so no image is a foreign condition to any other.
    assert {direction: len(listed) for direction, listed in found.items()} == {("text", "image"): 3}


def test_the_nearest_parts_are_paired_the_first_of_equals():
    image = lambda n: [BOI, IMAGE + n, EOI]  # noqa: E731
    document = Document(np.array([BOS, *image(1), *image(2), 8, 9, *image(3), EOS]), {})
    parts = nearest_parts(document, VOCABULARY, "image", "text")
    assert parts and (list(parts.condition.ids), list(parts.target.ids)) == (image(2), [8, 9])
    parts = nearest_parts(document, VOCABULARY, "text", "image")
    assert parts and (list(parts.condition.ids), list(parts.target.ids)) == ([8, 9], image(2))
    assert nearest_parts(document, VOCABULARY, "text", "speech") is None


def test_context_without_loss_is_no_target_of_any_evaluation(tmp_path: Path):
    ids = [np.array([BOS, 8, 9, 10 + i, BOI, IMAGE + i, EOI, EOS]) for i in range(6)]
    # Half a text is context in documents 0 to 2, and the picture in the others.
    masked = {i: np.array([[1, 3]] if i < 3 else [[4, 7]]) for i in range(6)}
    write_token_folder(tmp_path, ids, VOCABULARY, documents_per_shard=6, masked=masked)
    source = TokenSource.open(tmp_path)
    found = pairs(source, num_documents=6, context_tokens=64)
    assert sorted(pair.target.ids[1] - IMAGE for pair in found["text", "image"]) == [0, 1, 2]
    counted = [pair.target.ids[pair.counted].tolist() for pair in found["image", "text"]]
    assert sorted(map(len, counted)) == [1, 1, 1, 3, 3, 3]
    text = pair_text(found["image", "text"][0].foreign, found["image", "text"][0], VOCABULARY)
    assert text.ids[1:][text.weights > 0].tolist() == counted[0]
    unmasked = {d: [pair._replace(counted=pair.counted | True) for pair in own] for d, own in found.items()}
    assert fingerprint([], found) != fingerprint([], unmasked)
    heldout = heldout_texts(source, num_sequences=1, context_tokens=64)
    alone = first_texts(source, num_documents=6, context_tokens=64)
    assert [text.weights.tolist() for text in alone] == [text.weights.tolist() for text in heldout]


@pytest.mark.parametrize(
    ("condition", "target", "counted"),
    [
        ([8, 9], [BOI, IMAGE, IMAGE + 1, EOI], [IMAGE, IMAGE + 1]),
        ([BOI, IMAGE, EOI], [8, 9, 10], [8, 9, 10]),
        ([BOI, IMAGE, EOI], [BOS_SPEECH, SPEECH, EOS_SPEECH], [SPEECH]),
    ],
)
def test_only_the_ids_of_the_target_count(condition: list[int], target: list[int], counted: list[int]):
    parts = [Part(np.array(ids)) for ids in (condition, [], target)]
    pair = Pair(*parts, np.ones(len(target), bool), "s/k")
    text = pair_text(pair.condition, pair, VOCABULARY)
    assert text.ids.tolist() == [BOS, *condition, *target, EOS]
    assert text.ids[1:][text.weights > 0].tolist() == counted
    assert set(text.weights.tolist()) == {0.0, 1.0}


def test_directions_are_the_same_whatever_is_asked_beside_them(heldout: TokenSource):
    few = pairs(heldout, num_documents=3, context_tokens=CONTEXT_TOKENS)
    many = pairs(heldout, num_documents=6, context_tokens=CONTEXT_TOKENS)
    for direction, listed in few.items():
        assert [pair.name for pair in listed] == [pair.name for pair in many[direction]][: len(listed)]


OF_VECTORS = Vocabulary(
    sizes={"text": 24, "image": 1}, vectors={"image": VectorFormat(features=2, dtype="uint8")}
)


def test_vectors_go_with_the_ids_of_texts_and_of_parts(tmp_path: Path):
    code = OF_VECTORS.first_code("image")
    ids = [np.array([BOS, *[8] * 20, BOI, code, code, EOI, 9, BOI, code, EOI, EOS]) for _ in range(3)]
    images = [{"image": np.arange(6, dtype=np.uint8).reshape(3, 2) + 10 * i} for i in range(3)]
    write_token_folder(tmp_path, ids, OF_VECTORS, documents_per_shard=3, vectors=images)
    source = TokenSource.open(tmp_path)
    texts = first_texts(source, num_documents=3, context_tokens=26)
    assert [text.vectors["image"].tolist() for text in texts[:2]] == [
        images[int(texts[0].name[-1])]["image"][rows].tolist() for rows in (slice(2), slice(2, 3))
    ]
    assert (
        texts[0].vectors["image"].tolist()
        == heldout_texts(source, num_sequences=6, context_tokens=26)[0].vectors["image"].tolist()
    )
    found = pairs(source, num_documents=3, context_tokens=64)
    assert {direction: len(listed) for direction, listed in found.items()} == {("image", "text"): 3}
    pair = found["image", "text"][0]
    own = images[int(pair.name[-1])]["image"]
    assert pair.condition.vectors["image"].tolist() == own[:2].tolist()
    assert pair.foreign.ids.tolist() == pair.condition.ids.tolist() and not pair.foreign.equals(
        pair.condition
    )
    assert pair_text(pair.foreign, pair, OF_VECTORS).vectors["image"].tolist() == (
        pair.foreign.vectors["image"].tolist()
    )
    other = texts[0]._replace(vectors={"image": own[:2] + 1})
    assert fingerprint([other], {}) != fingerprint([texts[0]], {})
