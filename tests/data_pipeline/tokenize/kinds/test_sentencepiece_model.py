from pathlib import Path

import sentencepiece

from data_pipeline.tokenize.kinds.sentencepiece_model import read_file
from tests.data_pipeline.tokenize.tiny_text_tokenizers import TEXTS, sentencepiece_file


def test_ids_are_those_of_the_library(tmp_path: Path) -> None:
    path = sentencepiece_file(tmp_path, user_defined_symbols=["<sum>"])
    codec = read_file(path.read_bytes())
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert codec.encode(TEXTS[1]) == theirs.encode(TEXTS[1]) and codec.num_ids == theirs.get_piece_size()
    assert codec.special_id("<s>") == 1
    assert codec.special_id("<sum>") is None, "a text that holds it becomes this piece"
