"""Text tokenizers of files: their ids, special tokens behind them, and what a machine checks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.tokenize.kinds import huggingface, sentencepiece_model
from data_pipeline.tokenize.prepare import tokenize
from data_pipeline.tokenize.pretrained_text import GOLDEN, PretrainedConfig, PretrainedText
from data_pipeline.tokenize.registry import open_tokenizer, save_tokenizer
from data_pipeline.tokenize.tokenizer_set import load_tokenizers, vocabulary_of
from tests.data_pipeline.tokenize.tiny_text_tokenizers import TEXTS, hugging_face_file, sentencepiece_file

KINDS: dict[str, tuple[Any, Callable[..., Path]]] = {
    "huggingface": (huggingface.TOKENIZER, hugging_face_file),
    "sentencepiece": (sentencepiece_model.TOKENIZER, sentencepiece_file),
}


def made(kind: str, folder: Path, **settings: str) -> PretrainedText:
    definition, write = KINDS[kind]
    return definition.fit((), PretrainedConfig(file=str(write(folder).parent), **settings), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_the_file_stay_and_special_tokens_follow(kind: str, tmp_path: Path) -> None:
    tokenizer = made(kind, tmp_path)
    first = tokenizer.codec.num_ids
    assert tokenizer.special_ids == tuple(range(first, first + 7)) and tokenizer.size == first + 7
    codes = tokenizer.encode(TEXTS[7])
    assert codes.dtype == np.int32 and 0 < len(codes) < len(TEXTS[7]) and codes.max() < first
    assert tokenizer.decode(codes).split() == TEXTS[7].split()


@pytest.mark.parametrize(
    ("kind", "begin", "end"), [("huggingface", "<|begin|>", "<|end|>"), ("sentencepiece", "<s>", "</s>")]
)
def test_special_tokens_of_the_file_are_named(kind: str, begin: str, end: str, tmp_path: Path) -> None:
    tokenizer = made(kind, tmp_path, bos=begin, eos=end)
    first = tokenizer.codec.num_ids
    bos, eos = (tokenizer.codec.special_id(name) for name in (begin, end))
    assert tokenizer.special_ids == (first, bos, eos, *range(first + 1, first + 5))
    assert tokenizer.fingerprint != made(kind, tmp_path).fingerprint, "the same text is another document"
    with pytest.raises(ConfigError, match=r'text\.eos = "<\|ende\|>": no special token of .*; leave the key'):
        vocabulary_of({"text": made(kind, tmp_path, eos="<|ende|>")})


def test_text_that_looks_like_a_special_token_is_text(tmp_path: Path) -> None:
    tokenizer = made("huggingface", tmp_path, bos="<|begin|>", eos="<|endoftext|>")
    codes = tokenizer.encode("a<|endoftext|>b<|begin|>")
    assert not set(codes.tolist()) & set(tokenizer.special_ids)
    assert tokenizer.decode(codes) == "a<|endoftext|>b<|begin|>"


def test_a_file_cuts_and_fills_nothing_and_draws_nothing(tmp_path: Path) -> None:
    plain = made("huggingface", tmp_path / "plain").encode(TEXTS[0]).tolist()
    truncation = {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    padding = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|begin|>"}
    hugging_face_file(tmp_path / "cut", truncation=truncation, padding=padding)
    config = PretrainedConfig(file=str(tmp_path / "cut"))
    assert huggingface.TOKENIZER.fit((), config, 0).encode(TEXTS[0]).tolist() == plain
    hugging_face_file(tmp_path / "drop", model={"dropout": 0.1})
    with pytest.raises(ConfigError, match=r"model\.dropout = 0\.1 makes its ids random"):
        huggingface.TOKENIZER.fit((), PretrainedConfig(file=str(tmp_path / "drop")), 0).encode("a")


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'text\.file = ".*": there is no file .*tokenizer\.json'):
        huggingface.TOKENIZER.fit((), PretrainedConfig(file=str(tmp_path)), 0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r'text\.file = ".*": tokenizers cannot read it'):
        huggingface.TOKENIZER.fit((), PretrainedConfig(file=str(tmp_path)), 0).encode("a")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_whole_and_its_golden_ids_are_compared(kind: str, tmp_path: Path) -> None:
    tokenizer, folder = made(kind, tmp_path / "file"), tmp_path / "saved"
    save_tokenizer(folder, "text", kind, tokenizer)
    opened = open_tokenizer(folder, "text")
    assert opened.fingerprint == tokenizer.fingerprint
    assert opened.encode(TEXTS[3]).tolist() == tokenizer.encode(TEXTS[3]).tolist()
    saved = (folder / tokenizer.saved_name).read_bytes()
    (folder / tokenizer.saved_name).write_bytes(saved[:-9])
    with pytest.raises(ConfigError, match=rf"{folder}.*: .* cannot read it"):
        open_tokenizer(folder, "text")
    (folder / tokenizer.saved_name).write_bytes(saved)
    golden = json.loads((folder / GOLDEN).read_text())
    golden["ids"][4] += 1  # what another version of the library might have given
    (folder / GOLDEN).write_text(json.dumps(golden))
    with pytest.raises(ConfigError, match=r"gives the golden text other ids than .*, from id number 4 on"):
        open_tokenizer(folder, "text")


def test_documents_of_such_a_tokenizer_are_token_shards(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    path = hugging_face_file(tmp_path / "file")
    (tmp_path / "data.toml").write_text(
        f'[text]\nkind = "huggingface"\nfile = "{path}"\neos = "<|endoftext|>"\n'
        '[source]\nparts = [{text = "json:text"}]\n'
    )
    manifests = tokenize(
        tmp_path / "raw", tmp_path / "out", config_path=str(tmp_path / "data.toml"), processes=1
    )
    source = TokenSource.open(tmp_path / "out")
    assert source.vocabulary == Vocabulary(**Vocabulary.values_of(manifests[""]))
    ids = source.read(0)
    first = source.vocabulary.sizes["text"] - 6  # six are added, since <eos> is one of the file
    assert (ids[0], ids[-1]) == (source.vocabulary.bos, source.vocabulary.eos) == (first + 1, 2)
    ((modality, start, end),) = read_spans(ids, source.vocabulary)
    assert (modality, start, end) == ("text", 1, len(ids) - 1)
    assert load_tokenizers(tmp_path / "out/tokenizers")["text"].decode(ids[1:-1]) == TEXTS[0]
    with pytest.raises(ConfigError, match=r'for tokenizer\.json: \[text\] kind = "huggingface", file = '):
        load_tokenizers(path.parent)
