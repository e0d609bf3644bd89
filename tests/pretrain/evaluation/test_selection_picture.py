"""What is faded and what is not, patch by patch; and images that cannot be decoded."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.vocabulary import BOI, BOS, EOI, EOS
from data_pipeline.tokenize.kinds.patch_kmeans import CODEBOOK
from pretrain.evaluation.documents import Text
from pretrain.evaluation.selection_picture import (
    CELL_PX,
    GAP_PX,
    LABEL_PX,
    LAYERS_DRAWN,
    image_tokenizer,
    sheet,
)
from tests.pretrain.tiny_data import VOCABULARY
from tests.tools.conftest import SIDE, write_data
from tests.tools.conftest import image_tokenizer as grey_patches

PATCH_PX = CELL_PX // SIDE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TokenSource:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return TokenSource.open(folder / "heldout")


def text_of(codes: np.ndarray, words: int) -> Text:
    """A document whose image begins at slot words + 2."""
    ids = np.array([BOS, *[9] * words, BOI, *(codes + VOCABULARY.start("image")), EOI, 9, EOS])
    return Text(ids, np.ones(len(ids) - 1, np.float32), f"shard/{words}")


def panel(page: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = row * (LABEL_PX + CELL_PX + GAP_PX) + LABEL_PX, column * (CELL_PX + GAP_PX)
    return page[top : top + CELL_PX, left : left + CELL_PX]


def faded_patches(page: np.ndarray, row: int, column: int) -> np.ndarray:
    """[rows, columns], read off the pixels: a patch is as in the image itself, or bluish all over."""
    image, drawn = (
        panel(page, row, each).reshape(SIDE, PATCH_PX, SIDE, PATCH_PX, 3).swapaxes(1, 2)
        for each in (0, column)
    )
    same = (drawn == image).all(axis=(2, 3, 4))
    bluish = (drawn[..., 2] > drawn[..., 0]).all(axis=(2, 3))
    assert (same != bluish).all()
    return bluish


def test_exactly_the_patches_that_skip_are_faded(source: TokenSource) -> None:
    rng = np.random.default_rng(0)
    codes = [rng.permutation(16), rng.permutation(16)]
    texts = [text_of(codes[0], 2), text_of(codes[1], 5)]
    ran = {layer: rng.random((2, 40)) < 0.5 for layer in (7, 2, 11)}
    page = sheet(texts, ran, source)
    assert page.shape == (2 * (LABEL_PX + CELL_PX + GAP_PX) + LABEL_PX, 4 * (CELL_PX + GAP_PX), 3)
    for row, start in enumerate((4, 7)):
        greys = panel(page, row, 0)[PATCH_PX // 2 :: PATCH_PX, PATCH_PX // 2 :: PATCH_PX, 0]
        assert (greys == 15 * codes[row].reshape(SIDE, SIDE)).all()
        for column, layer in enumerate((2, 7, 11), 1):
            runs = ran[layer][row, start : start + 16].reshape(SIDE, SIDE)
            assert (faded_patches(page, row, column) == ~runs).all()


def test_of_many_layers_some_are_drawn(source: TokenSource) -> None:
    ran = {layer: np.full((1, 40), layer in (0, 29)) for layer in range(30)}
    page = sheet([text_of(np.arange(16), 1)], ran, source)
    assert page.shape[1] == (1 + LAYERS_DRAWN) * (CELL_PX + GAP_PX)
    faded = [faded_patches(page, 0, column).all() for column in range(1, 1 + LAYERS_DRAWN)]
    assert faded == [False, *[True] * (LAYERS_DRAWN - 2), False]


def test_what_cannot_be_decoded_is_a_plain_grid(source: TokenSource, tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "tokenizers").rename(tmp_path / "elsewhere")
    undecoded = TokenSource.open(tmp_path / "heldout")
    texts, ran = [text_of(np.arange(16), 1)], {0: np.arange(40)[None] < 3 + 5}
    page = sheet(texts, ran, undecoded)
    assert len(np.unique(panel(page, 0, 0))) == 1
    assert faded_patches(page, 0, 1).reshape(-1).tolist() == [False] * 5 + [True] * 11
    assert page[-LABEL_PX:].min() < 100 and sheet(texts, ran, source)[-LABEL_PX:].min() == 255  # says why

    six = sheet([text_of(np.arange(6), 1)], {0: np.arange(40)[None] < 3 + 3}, source)  # 2 x 3
    blue = panel(six, 0, 1)[CELL_PX // 4 :: CELL_PX // 2, CELL_PX // 6 :: CELL_PX // 3, 2] < 235
    assert blue.tolist() == [[False] * 3, [True] * 3]


def test_a_tokenizer_that_is_not_the_datas_own_is_not_used(tmp_path: Path) -> None:
    write_data(tmp_path)
    source = TokenSource.open(tmp_path / "heldout")
    found = image_tokenizer(source)
    assert not isinstance(found, str) and found.fingerprint == grey_patches().fingerprint
    source.manifest["tokenizers"]["image"]["fingerprint"] = "x"
    assert "was made by x" in str(image_tokenizer(source))
    (tmp_path / "tokenizers" / "image" / CODEBOOK).write_bytes(b"damaged")
    assert str(tmp_path / "tokenizers" / "image") in str(image_tokenizer(source))
    (tmp_path / "tokenizers").rename(tmp_path / "elsewhere")
    assert "no tokenizer of images beside" in str(image_tokenizer(source))
