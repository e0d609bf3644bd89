"""Ids and vectors as what they stand for: text, and files of pictures and sound."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

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


def decode(
    ids: Int[np.ndarray, " tokens"],
    vocabulary: Vocabulary,
    tokenizers: Mapping[str, Tokenizer],
    vectors: Mapping[str, np.ndarray] | None = None,
) -> list[Piece]:
    """The parts of a stretch of a document whose spans are whole, with or without <bos> and <eos>.

    `vectors`: those of all its ids (data_pipeline/shards/vectors.py). Without them their number is shown.
    """
    bos, eos = vocabulary.bos, vocabulary.eos
    inside = ids[(ids != bos) & (ids != eos)]
    document = np.concatenate([[bos], inside, [eos]]).astype(np.int64)
    found = []
    for modality, start, end in read_spans(document, vocabulary):
        tokenizer = tokenizers[modality]
        if modality == TEXT:
            found.append(Piece(TEXT, text=tokenizer.decode(document[start:end])))
            continue
        codes = document[start + 1 : end - 1] - vocabulary.first_code(modality)
        medium, of_vectors = tokenizer.medium, modality in vocabulary.vectors
        if of_vectors and vectors is not None:
            codes = within(vectors, document, start, end, vocabulary)[modality]
        if medium is None or medium.file is None or (of_vectors and vectors is None):
            shown = f"{len(codes)} vectors" if of_vectors else f"codes {' '.join(map(str, codes))}"
            found.append(Piece(modality, text=f"[{modality}: {shown}]"))
        else:
            content = tokenizer.decode(codes)
            found.append(Piece(modality, file=medium.file(content), suffix=medium.suffix))
    return found


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
