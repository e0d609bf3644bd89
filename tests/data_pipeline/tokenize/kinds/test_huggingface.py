import pytest

from data_pipeline.tokenize.kinds.huggingface import read_file
from tests.data_pipeline.tokenize.tiny_text_tokenizers import TEXTS, hugging_face_file


def test_ids_are_those_of_the_library(tmp_path_factory: pytest.TempPathFactory) -> None:
    import tokenizers

    path = hugging_face_file(tmp_path_factory.mktemp("file"))
    codec, theirs = read_file(path.read_bytes()), tokenizers.Tokenizer.from_file(str(path))
    ids = theirs.encode(TEXTS[1]).ids
    assert codec.encode(TEXTS[1]) == ids[1:] and ids[0] == codec.special_id("<|begin|>") == 0
    assert codec.num_ids == theirs.get_vocab_size() and codec.special_id("the") is None
