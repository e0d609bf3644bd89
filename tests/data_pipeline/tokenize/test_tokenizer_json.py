"""transformers gives texts the ids of the data."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.kinds import huggingface, sentencepiece_model
from data_pipeline.tokenize.kinds.bpe import BpeConfig, fit_bpe
from data_pipeline.tokenize.pretrained_text import PretrainedConfig
from data_pipeline.tokenize.tokenizer import Tokenizer
from data_pipeline.tokenize.tokenizer_json import tokenizer_files
from data_pipeline.tokenize.tokenizer_set import vocabulary_of
from tests.data_pipeline.tokenize.tiny_text_tokenizers import TEXTS, hugging_face_file, sentencepiece_file

LLAMA_2 = {"byte_fallback": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}


def of_file(kind: str, folder: Path, **settings: Any) -> Tokenizer:
    if kind == "bpe":
        return fit_bpe(TEXTS, BpeConfig(vocab_size=512))
    if kind == "huggingface":
        config = PretrainedConfig(file=str(hugging_face_file(folder)), eos="<|endoftext|>")
        return huggingface.TOKENIZER.fit((), config, 0)
    config = PretrainedConfig(file=str(sentencepiece_file(folder, **settings)), bos="<s>")
    return sentencepiece_model.TOKENIZER.fit((), config, 0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("bpe", {}), ("huggingface", {}), ("sentencepiece", {}), ("sentencepiece", LLAMA_2)],
)
def test_auto_tokenizer_gives_the_ids_of_a_document(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = of_file(kind, tmp_path, **settings)
    for name, value in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_text(json.dumps(value))
    theirs, vocabulary = AutoTokenizer.from_pretrained(tmp_path), vocabulary_of({"text": tokenizer})
    assert len(theirs) == vocabulary.size
    special = theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id
    assert special == (vocabulary.pad, vocabulary.bos, vocabulary.eos)
    rng = random.Random(0)
    for text in [*TEXTS[:5], *("".join(rng.choices("Return size 12 >>> f()\n.", k=40)) for _ in range(50))]:
        assert theirs(text).input_ids == [vocabulary.bos, *tokenizer.encode(text).tolist()]


def test_a_unigram_model_has_no_such_file(tmp_path: Path) -> None:
    tokenizer = of_file("sentencepiece", tmp_path, model_type="unigram", vocab_size=120)
    with pytest.raises(ConfigError, match="no BPE"):
        tokenizer_files(tokenizer)
