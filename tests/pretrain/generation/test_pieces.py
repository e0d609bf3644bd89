import io
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import wavfile

from data_pipeline.shards.vocabulary import BOI, BOS, BOS_SPEECH, EOI, EOS, EOS_SPEECH
from data_pipeline.tokenize.kinds.patches import PixelConfig, PixelPatches
from data_pipeline.tokenize.tokenizer_set import load_tokenizers, vocabulary_of
from pretrain.generation.pieces import Piece, decode, named_files
from tests.data_pipeline.video_tokenizer import Video, VideoConfig


def test_ids_become_text_and_the_files_of_their_codes(speaker: Path) -> None:
    tokenizers = load_tokenizers(speaker / "tokenizers")
    vocabulary = vocabulary_of(tokenizers)
    image = np.array([7, 0, 3, 5]) + vocabulary.first_code("image")
    speech = np.array([1, 0]) + vocabulary.first_code("speech")
    text = tokenizers["text"].encode("A red 3\n\0")
    ids = np.concatenate([[BOS], text, [BOI], image, [EOI], [BOS_SPEECH], speech, [EOS_SPEECH], [EOS]])
    said, drawn, spoken = decode(ids, vocabulary, tokenizers)
    assert said == Piece("text", text="A red 3\n\0")
    pixels = np.asarray(Image.open(io.BytesIO(drawn.file)))
    assert pixels[::4, ::4, 0].tolist() == [[210, 0], [90, 150]]
    assert len(wavfile.read(io.BytesIO(spoken.file))[1]) > 0
    whole, files = named_files([drawn, said, spoken], "000_01")
    assert whole == "[000_01_0.png]A red 3\n\0[000_01_1.wav]"
    assert list(files.items()) == [("000_01_0.png", drawn.file), ("000_01_1.wav", spoken.file)]
    assert decode(np.array([BOS]), vocabulary, tokenizers) == []


def test_vectors_become_pictures_where_they_are_given(speaker: Path) -> None:
    text = load_tokenizers(speaker / "tokenizers")["text"]
    tokenizers = {"text": text, "image": PixelPatches(PixelConfig(size_px=4, patch_px=2), 100.0, 50.0)}
    vocabulary = vocabulary_of(tokenizers)
    code = vocabulary.first_code("image")
    ids = np.array([BOI, *[code] * 4, EOI, BOI, *[code] * 4, EOI])
    vectors = np.arange(96, dtype=np.uint8).reshape(8, 12)
    pieces = decode(ids, vocabulary, tokenizers, {"image": vectors})
    for piece, own in zip(pieces, (vectors[:4], vectors[4:]), strict=True):
        assert (np.asarray(Image.open(io.BytesIO(piece.file))) == tokenizers["image"].decode(own)).all()
    assert decode(ids, vocabulary, tokenizers)[1] == Piece("image", text="[image: 4 vectors]")


def test_a_modality_without_a_medium_is_shown_as_its_codes(speaker: Path) -> None:
    video = Video(VideoConfig(num_codes=3), np.array([80, 160], np.float32))
    tokenizers = {"text": load_tokenizers(speaker / "tokenizers")["text"], "video": video}
    vocabulary = vocabulary_of(tokenizers)
    opening, closing = vocabulary.delimiters("video")
    ids = np.array([opening, vocabulary.first_code("video") + 2, vocabulary.first_code("video"), closing])
    assert decode(ids, vocabulary, tokenizers) == [Piece("video", text="[video: codes 2 0]")]
