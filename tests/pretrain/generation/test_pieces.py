import io
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import wavfile

from data_pipeline.shards.index import Document
from data_pipeline.shards.vocabulary import BOI, BOS, BOS_SPEECH, EOI, EOS, EOS_SPEECH
from data_pipeline.tokenize.tokenizer_set import load_tokenizers, vocabulary_of
from pretrain.generation.pieces import Piece, decode, named_files
from tests.data_pipeline.video_tokenizer import Video, VideoConfig
from tests.pretrain.tiny_tokenizers import write_tiny_tokenizers


def test_ids_become_text_and_the_files_of_their_codes(speaker: Path) -> None:
    tokenizers = load_tokenizers(speaker / "tokenizers")
    vocabulary = vocabulary_of(tokenizers)
    image = np.array([7, 0, 3, 5]) + vocabulary.first_code("image")
    speech = np.array([1, 0]) + vocabulary.first_code("speech")
    text = tokenizers["text"].encode("A red 3\n\0")
    ids = np.concatenate([[BOS], text, [BOI], image, [EOI], [BOS_SPEECH], speech, [EOS_SPEECH], [EOS]])
    said, drawn, spoken = decode(Document(ids), vocabulary, tokenizers)
    assert said == Piece("text", text="A red 3\n\0")
    pixels = np.asarray(Image.open(io.BytesIO(drawn.file)))
    assert pixels[::4, ::4, 0].tolist() == [[210, 0], [90, 150]]
    assert len(wavfile.read(io.BytesIO(spoken.file))[1]) > 0
    whole, files = named_files([drawn, said, spoken], "000_01")
    assert whole == "[000_01_0.png]A red 3\n\0[000_01_1.wav]"
    assert list(files.items()) == [("000_01_0.png", drawn.file), ("000_01_1.wav", spoken.file)]
    assert decode(Document(np.array([BOS])), vocabulary, tokenizers) == []


def test_vectors_of_several_images_become_their_pictures(tmp_path: Path) -> None:
    tokenizers = write_tiny_tokenizers(tmp_path, vectors=True)
    vocabulary, random = vocabulary_of(tokenizers), np.random.default_rng(1)
    pictures = random.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    image = [BOI, *[vocabulary.first_code("image")] * 4, EOI]
    text = tokenizers["text"].encode("A red 3")
    vectors = np.concatenate([tokenizers["image"].encode(picture) for picture in pictures])
    document = Document(np.concatenate([[BOS], image, text, image, [EOS]]), {"image": vectors})
    first, said, second = decode(document, vocabulary, tokenizers)
    assert said == Piece("text", text="A red 3")
    for piece, picture in zip((first, second), pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(piece.file))), picture)


def test_a_modality_without_a_medium_is_shown_as_its_codes(speaker: Path) -> None:
    video = Video(VideoConfig(num_codes=3), np.array([80, 160], np.float32))
    tokenizers = {"text": load_tokenizers(speaker / "tokenizers")["text"], "video": video}
    vocabulary = vocabulary_of(tokenizers)
    opening, closing = vocabulary.delimiters("video")
    ids = np.array([opening, vocabulary.first_code("video") + 2, vocabulary.first_code("video"), closing])
    assert decode(Document(ids), vocabulary, tokenizers) == [Piece("video", text="[video: codes 2 0]")]
