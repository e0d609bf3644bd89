from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.vocabulary import BOI, BOS, BOS_SPEECH, EOI, EOS, EOS_SPEECH
from data_pipeline.tokenize.media.pictures import png
from data_pipeline.tokenize.tokenizer_set import load_tokenizers
from pretrain.generation.grammar import FREE
from pretrain.generation.prompts import cut_at, heldout_prompts, part_prompts, prompt_of
from tests.pretrain.tiny_data import VOCABULARY, document, write_tokens
from tests.pretrain.tiny_tokenizers import write_demo_like_data

IMAGE, SPEECH = VOCABULARY.start("image"), VOCABULARY.start("speech")
WHOLE = np.array([BOS, 8, 9, BOI, IMAGE, IMAGE + 1, EOI, 10, BOS_SPEECH, SPEECH, EOS_SPEECH, EOS])
TEXT_ALONE = np.array([BOS, 8, 9, 10, 11, EOS])
IMAGE_ALONE = np.array([BOS, BOI, IMAGE, EOI, EOS])


def test_documents_are_cut_before_the_first_part_of_the_goal_that_follows_another() -> None:
    assert cut_at(WHOLE, VOCABULARY, FREE) == (3, 12)
    assert cut_at(WHOLE, VOCABULARY, "image") == (3, 7)
    assert cut_at(WHOLE, VOCABULARY, "text") == (7, 8)
    assert cut_at(WHOLE, VOCABULARY, "speech") == (8, 11)
    assert cut_at(TEXT_ALONE, VOCABULARY, FREE) == (3, 6)
    assert cut_at(TEXT_ALONE, VOCABULARY, "text") == (3, 5)
    assert cut_at(TEXT_ALONE, VOCABULARY, "image") is None
    assert cut_at(IMAGE_ALONE, VOCABULARY, FREE) is None


def test_heldout_prompts_are_beginnings_with_their_truth(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    write_tokens(tmp_path, [document(rng) for _ in range(20)])
    source = TokenSource.open(tmp_path)
    documents = {source.name(i): source.read(i).tolist() for i in range(20)}
    for goal in (FREE, "image"):
        found = heldout_prompts(source, 4, goal, 64)
        assert len({prompt.name for prompt in found}) == 4
        for prompt in found:
            assert prompt.truth is not None
            both = [*prompt.ids.tolist(), *prompt.truth.ids.tolist()]
            assert both == documents[prompt.name][: len(both)]
            assert goal == FREE or (prompt.truth.ids[0], prompt.truth.ids[-1]) == (BOI, EOI)
    assert [p.name for p in heldout_prompts(source, 2, FREE, 64)] == [
        p.name for p in heldout_prompts(source, 4, FREE, 64)
    ][:2]
    with pytest.raises(ConfigError, match=r"--heldout 21: .* has .* documents in which a part follows"):
        heldout_prompts(source, 21, FREE, 64)
    with pytest.raises(ConfigError, match="0 documents in which a part of image follows another part within"):
        heldout_prompts(source, 1, "image", 1)


def test_parts_are_encoded_in_their_order(speaker: Path) -> None:
    tokenizers = load_tokenizers(speaker / "tokenizers")
    a, b = tokenizers["text"].encode("A red 3"), tokenizers["text"].encode(" left")
    found = prompt_of([("text", "A red 3"), ("text", ""), ("text", " left")], tokenizers)
    assert found.ids.tolist() == [BOS, *a, *b] and found.truth is None
    with pytest.raises(ConfigError, match=r"--image x\.png: the model knows no image, only text"):
        prompt_of([("image", "x.png")], {"text": tokenizers["text"]})


def test_prompts_hold_the_vectors_of_their_images(tmp_path: Path) -> None:
    """Of files, of parts of held-out documents and of their beginnings."""
    vocabulary = write_demo_like_data(tmp_path, vectors=True)
    tokenizers, source = load_tokenizers(tmp_path / "tokenizers"), TokenSource.open(tmp_path / "heldout")
    pictures = [np.full((8, 8, 3), grey, np.uint8) for grey in (10, 200)]
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(png(picture))
    parts = [("image", str(tmp_path / "0.png")), ("text", "and"), ("image", str(tmp_path / "1.png"))]
    prompt = prompt_of(parts, tokenizers)
    code = vocabulary.first_code("image")
    assert (prompt.ids == code).sum() == 8
    assert prompt.document.vectors["image"].tolist() == [[10] * 48] * 4 + [[200] * 48] * 4
    truths = {source.name(i): source.document(i).vectors["image"].tolist() for i in range(40)}
    for drawn, written in zip(
        *(part_prompts(source, 3, 64)[d] for d in (("text", "image"), ("image", "text"))), strict=True
    ):
        assert drawn.truth is not None and len(drawn.document.vectors["image"]) == 0
        assert drawn.truth.vectors["image"].tolist() == truths[drawn.name]
        assert written.document.vectors["image"].tolist() == truths[drawn.name]
    for goal in ("image", "text"):
        for found in heldout_prompts(source, 4, goal, 64):
            assert found.truth is not None
            for part in (found.document, found.truth):
                assert len(part.vectors["image"]) == (part.ids == code).sum()
            assert goal == "text" or found.truth.vectors["image"].tolist() == truths[found.name]


def test_parts_are_prompts_of_each_other(tmp_path: Path) -> None:
    vocabulary = write_demo_like_data(tmp_path)
    source = TokenSource.open(tmp_path / "heldout")
    found = part_prompts(source, 3, 64)
    assert set(found) == set(permutations(vocabulary.modalities, 2))
    assert {len(prompts) for prompts in found.values()} == {3}
    drawn, written = found["text", "image"][0], found["image", "text"][0]
    assert drawn.truth is not None and written.truth is not None and drawn.name == written.name
    assert drawn.ids[0] == written.ids[0] == BOS
    np.testing.assert_array_equal(drawn.ids[1:], written.truth.ids)
    np.testing.assert_array_equal(written.ids[1:], drawn.truth.ids)
    assert len(part_prompts(source, 1, 64)["text", "image"]) == 1
