"""Text <-> tokens: sentencepiece BPE that gives back every string as it was."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.vocabulary import BOS, EOS, PAD, SPECIAL_TOKENS
from data_pipeline.tokenize.config import TextConfig
from data_pipeline.tokenize.raw import SampleError
from data_pipeline.tokenize.tokenizer import check_fingerprint, fingerprint_of, load_settings, save_settings

MODEL = "sentencepiece.model"
_UNKNOWN = len(SPECIAL_TOKENS)
"""sentencepiece insists on an unknown piece; byte pieces keep it from ever being used."""
_SPACE_MARK = "\u2581"
"""What sentencepiece writes for a space inside its pieces, and so would decode to a space."""


@dataclass(frozen=True)
class TextTokenizer:
    settings: Mapping[str, Any]
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
        try:
            data.encode()
        except UnicodeEncodeError as error:
            raise SampleError(f"text is not valid Unicode: {error}") from None
        return data

    def encode(self, content: str) -> np.ndarray:
        first, *rest = content.split(_SPACE_MARK)
        ids = self._processor.encode(first)
        for piece in rest:
            ids += self._space_mark_bytes + self._processor.encode(piece)
        return np.asarray(ids, np.int32)

    def decode(self, codes: np.ndarray) -> str:
        return self._processor.decode([int(code) for code in codes])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / MODEL) as file:
            file.write(self.model)
        save_settings(folder, self)

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        tokenizer = cls(load_settings(folder), (folder / MODEL).read_bytes())
        check_fingerprint(folder, tokenizer)
        return tokenizer


def fit_text(texts: Sequence[str], config: TextConfig) -> TextTokenizer:
    """Train BPE. The special tokens are its first ids; it may have fewer pieces than asked, if text runs out.

    Raises ConfigError if the texts cannot carry a vocabulary, or need a larger one.
    """
    if not any(texts):
        raise ConfigError("no text to train the text tokenizer on: no document has a text part")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
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
    except RuntimeError as error:
        raise ConfigError(
            f"text.vocab_size = {config.vocab_size}: sentencepiece cannot train on {len(texts)} texts: "
            f"{error}"
        ) from None
    tokenizer = TextTokenizer(config.model_dump(mode="json"), model.getvalue())
    found = tuple(tokenizer._processor.id_to_piece(index) for index in range(len(SPECIAL_TOKENS)))
    assert found == SPECIAL_TOKENS, found
    return tokenizer
