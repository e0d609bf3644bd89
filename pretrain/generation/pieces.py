"""Ids and vectors as what they stand for: text, and files of pictures and sound."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from data_pipeline.shards.index import Document
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.vectors import within
from data_pipeline.shards.vocabulary import TEXT, Vocabulary
from data_pipeline.tokenize.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A part of a document."""

    modality: str
    text: str = ""
    """The text, or the codes or the number of vectors of a modality of which no file can be made."""
    file: bytes = b""
    suffix: str = ""
    """Ending of the file, such as png; empty where there is none."""


def decode(document: Document, vocabulary: Vocabulary, tokenizers: Mapping[str, Tokenizer]) -> list[Piece]:
    """The parts of a stretch of a document whose spans are whole, with or without <bos> and <eos>."""
    bos, eos, ids = vocabulary.bos, vocabulary.eos, document.ids
    inside = ids[(ids != bos) & (ids != eos)]
    whole = np.concatenate([[bos], inside, [eos]]).astype(np.int64)
    found = []
    for modality, start, end in read_spans(whole, vocabulary):
        tokenizer = tokenizers[modality]
        if modality == TEXT:
            found.append(Piece(TEXT, text=tokenizer.decode(whole[start:end])))
            continue
        codes = whole[start + 1 : end - 1] - vocabulary.first_code(modality)
        if modality in vocabulary.vectors:
            codes = within(document.vectors, whole, start, end, vocabulary)[modality]
        medium = tokenizer.medium
        if medium is None or medium.file is None:
            of = f"{len(codes)} vectors" if modality in vocabulary.vectors else "codes " + _joined(codes)
            found.append(Piece(modality, text=f"[{modality}: {of}]"))
        else:
            content = tokenizer.decode(codes)
            found.append(Piece(modality, file=medium.file(content), suffix=medium.suffix))
    return found


def _joined(codes: Int[np.ndarray, " codes"]) -> str:
    return " ".join(map(str, codes))


def named_files(pieces: Sequence[Piece], stem: str) -> tuple[str, dict[str, bytes]]:
    """(text in which "[name]" stands for a file, name -> content of the files) of a sample."""
    text, files = "", {}
    for piece in pieces:
        if piece.suffix:
            name = f"{stem}_{len(files)}.{piece.suffix}"
            files[name] = piece.file
            text += f"[{name}]"
        else:
            text += piece.text
    return text, files
