"""Text of raw documents."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.tokenize.raw import SampleError
from data_pipeline.tokenize.tokenizer import Medium, Tokenizer


def read_text(data: str) -> str:
    """The text itself. Raises SampleError for half of a surrogate pair, which no encoding can write."""
    try:
        data.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"text is not valid Unicode: {error}") from None
    return data


def _measure(_: Tokenizer, content: Any, codes: np.ndarray, __: Mapping[str, float]) -> dict[str, float]:
    return {"text_bytes": len(content.encode()), "text_tokens": len(codes)}


def _summary(figures: Mapping[str, float]) -> str | None:
    if not figures.get("text_tokens"):
        return None
    return f"{figures['text_bytes'] / figures['text_tokens']:.2f} bytes a token"


TEXT_MEDIUM = Medium(_measure, _summary)
