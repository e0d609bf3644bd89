from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.vocabulary import SPECIAL_TOKENS
from data_pipeline.tokenize.kinds.bpe import MODEL, BpeConfig, fit_bpe
from data_pipeline.tokenize.registry import open_tokenizer, save_tokenizer

TEXTS = [f"Return the {word} of item {i}.\n\n    >>> f({i})\n" for i in range(40) for word in ("sum", "size")]
TOKENIZER = fit_bpe(TEXTS, BpeConfig(vocab_size=512))


@given(st.text())
@example(" a  b\n\n\tc \r\n ")
@example("\u2581 is how sentencepiece writes a space \u2581\u2581")
@example("<bos> <boi> <unk> <0x41> </s>")
@example("\0 \ufeff \u2028 e\u0301 日本 \U0001f600")
@example("")
def test_every_string_comes_back_as_it_was(text: str) -> None:
    codes = TOKENIZER.encode(text)
    assert TOKENIZER.decode(codes) == text
    assert codes.dtype == np.int32
    assert (codes > len(SPECIAL_TOKENS)).all(), "text never makes a special or the unknown token"
    assert (codes < TOKENIZER.size).all()


def test_words_of_the_corpus_take_few_tokens() -> None:
    assert len(TOKENIZER.encode(TEXTS[5])) < len(TEXTS[5]) / 2


def test_fitting_is_deterministic_and_saved_whole(tmp_path: Path) -> None:
    again = fit_bpe(TEXTS, BpeConfig(vocab_size=512))
    assert again.model == TOKENIZER.model and again.fingerprint == TOKENIZER.fingerprint
    assert fit_bpe(TEXTS[1:], BpeConfig(vocab_size=512)).fingerprint != TOKENIZER.fingerprint
    save_tokenizer(tmp_path, "text", "bpe", TOKENIZER)
    loaded = open_tokenizer(tmp_path, "text")
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.encode(TEXTS[0]).tolist() == TOKENIZER.encode(TEXTS[0]).tolist()


def test_a_changed_model_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "text", "bpe", TOKENIZER)
    (tmp_path / MODEL).write_bytes(fit_bpe(TEXTS[1:], BpeConfig(vocab_size=512)).model)
    with pytest.raises(ConfigError, match="were changed after they were saved"):
        open_tokenizer(tmp_path, "text")


def test_the_size_is_the_actual_one_where_text_runs_out() -> None:
    assert 256 < fit_bpe(TEXTS, BpeConfig(vocab_size=4000)).size < 4000


def test_text_that_carries_no_vocabulary_is_said() -> None:
    with pytest.raises(ConfigError, match="no text to train"):
        fit_bpe([], BpeConfig())
    many_characters = ["".join(map(chr, range(0x4E00, 0x4E00 + 2000)))]
    with pytest.raises(ConfigError, match=r"text.vocab_size = 512: sentencepiece cannot train on 1 texts"):
        fit_bpe(many_characters, BpeConfig(vocab_size=512))
