"""Text <-> tokens: sentencepiece BPE that gives back every string as it was."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sentencepiece
from pydantic import Field

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.vocabulary import BOS, EOS, PAD, SPECIAL_TOKENS
from data_pipeline.tokenize.media.text import TEXT_MEDIUM, read_text
from data_pipeline.tokenize.tokenizer import Medium, TokenizerConfig, TokenizerKind, fingerprint_of

MODEL = "sentencepiece.model"
_UNKNOWN = len(SPECIAL_TOKENS)
"""Id of the unknown piece: sentencepiece insists on one, and byte pieces keep it from ever being used."""
_SPACE_MARK = "\u2581"
"""sentencepiece writes this character for a space inside of pieces, so it would decode it as a space."""


class BpeConfig(TokenizerConfig):
    """Settings of sentencepiece's byte-pair encoding."""

    vocab_size: int = Field(2048, ge=512)
    """Number of pieces, with the special tokens and 256 byte pieces."""

    @property
    def asked_size(self) -> int:
        return self.vocab_size


@dataclass(frozen=True)
class BpeTokenizer:
    """A trained sentencepiece model; `model` is the content of its file."""

    medium: ClassVar[Medium | None] = TEXT_MEDIUM

    config: BpeConfig
    model: bytes

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @property
    def size(self) -> int:
        return self._processor.get_piece_size()

    @property
    def fingerprint(self) -> str:
        return fingerprint_of({"kind": "sentencepiece"}, self.model)

    @cached_property
    def _space_mark_bytes(self) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def read(self, data: str) -> str:
        return read_text(data)

    def encode(self, content: str) -> np.ndarray:
        first, *rest = content.split(_SPACE_MARK)
        ids = self._processor.encode(first)
        for piece in rest:
            ids += self._space_mark_bytes + self._processor.encode(piece)
        return np.asarray(ids, np.int32)

    def decode(self, codes: np.ndarray) -> str:
        return self._processor.decode([int(code) for code in codes])

    def save(self, folder: Path) -> None:
        with atomic_file(folder / MODEL) as file:
            file.write(self.model)


def open_bpe(folder: Path, config: BpeConfig) -> BpeTokenizer:
    """The tokenizer that `BpeTokenizer.save` wrote."""
    return BpeTokenizer(config, (folder / MODEL).read_bytes())


def fit_bpe(contents: Iterable[str], config: BpeConfig, seed: int = 0) -> BpeTokenizer:
    """Train BPE. The special tokens are its first ids. It has fewer pieces than asked for where the texts
    have fewer. Training draws nothing at random, so `seed` changes nothing.

    Raises ConfigError if the texts cannot carry a vocabulary, or need a larger one.
    """
    texts = list(contents)
    if not any(texts):
        raise ConfigError("no text to train the text tokenizer on: no document has a text part")
    try:
        model = _train(texts, config.vocab_size)
    except RuntimeError as error:
        raise ConfigError(
            f"text.vocab_size = {config.vocab_size}: sentencepiece cannot train on {len(texts)} texts: "
            f"{error}"
        ) from None
    tokenizer = BpeTokenizer(config, model)
    first_pieces = tuple(tokenizer._processor.id_to_piece(index) for index in range(len(SPECIAL_TOKENS)))
    assert first_pieces == SPECIAL_TOKENS, first_pieces
    return tokenizer


def _train(texts: list[str], vocab_size: int) -> bytes:
    """A sentencepiece model, as its file's content, that gives back every string as it was."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=PAD,
        bos_id=BOS,
        eos_id=EOS,
        unk_id=_UNKNOWN,
        pad_piece=SPECIAL_TOKENS[PAD],
        bos_piece=SPECIAL_TOKENS[BOS],
        eos_piece=SPECIAL_TOKENS[EOS],
        control_symbols=list(SPECIAL_TOKENS[EOS + 1 :]),
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentence_length=1 << 24,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _read(data: Any, config: BpeConfig) -> str:
    return read_text(data)


TOKENIZER = TokenizerKind(BpeConfig, read=_read, fit=fit_bpe, open=open_bpe)
