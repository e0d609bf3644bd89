"""Documents of a list of texts and a list of pictures, as OBELICS and MMC4 have them.

    {interleaved = "json:texts+images"}             OBELICS: element i of the two lists is a text or a picture
    {interleaved = "json:text_list+image_info"}     MMC4: a picture stands before the text that it matches

A picture is null, the name of a member (`0.jpg`, or `KEY.0.jpg`), or a table with `image_name` and
`matched_text_index`, which may bring its content as `image_base64`. Texts that follow each other are joined
by a space.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.shards.vocabulary import TEXT
from data_pipeline.tokenize.raw import Part, SampleError, member

INTERLEAVED = "interleaved"
PREFIX = "json:"
_MATCHED, _NAME, _BASE64 = "matched_text_index", "image_name", "image_base64"
_IMAGE = "image"


def keys_of(where: str) -> tuple[str, str] | None:
    """("texts", "images") for "json:texts+images"; None for another text."""
    texts, _, images = where.removeprefix(PREFIX).partition("+")
    return (texts, images) if where.startswith(PREFIX) and texts and images else None


def interleaved_parts(
    where: str, key: str, sample: Mapping[str, bytes], values: Mapping[str, Any], *, optional: bool
) -> list[Part]:
    """The parts of a sample; [] if its .json `values` hold no such lists. `optional`: a picture that the
    sample lacks is left out. Raises SampleError for lists that are none, and a picture that is not there."""
    keys = keys_of(where)
    if keys is None or keys[0] not in values:
        return []
    texts, images = (values.get(name) for name in keys)
    if not isinstance(texts, list) or not isinstance(images, list):
        raise SampleError(f'"{keys[0]}" and "{keys[1]}" are not both lists')
    if any(text is not None and not isinstance(text, str) for text in texts):
        raise SampleError(f'"{keys[0]}" holds elements that are neither text nor null')
    matched = all(isinstance(image, dict) for image in images)
    before = _by_match(images, len(texts)) if matched else _by_place(texts, images, keys)
    parts: list[Part] = []
    for text, pictures in zip(texts, before, strict=True):
        for picture in pictures:
            content = _content(picture, key, sample)
            if content is None and not optional:
                raise SampleError(
                    f"its picture {_name(picture)!r:.80} is no member of the sample; members here: "
                    f"{sorted(sample)[:8]}. To leave such pictures out, end the value with ?"
                )
            parts += [] if content is None else [Part(_IMAGE, content)]
        if text:
            parts = _with_text(parts, text)
    return parts


def _by_place(texts: Sequence[Any], images: Sequence[Any], keys: tuple[str, str]) -> list[list[Any]]:
    """The pictures at each place of two lists that are equally long."""
    if len(texts) != len(images):
        raise SampleError(f'"{keys[0]}" has {len(texts)} elements, "{keys[1]}" has {len(images)}')
    if both := [i for i, pair in enumerate(zip(texts, images, strict=True)) if all(pair)]:
        raise SampleError(f"element {both[0]} is a text and a picture, so their order is not known")
    return [[image] if image else [] for image in images]


def _by_match(images: Sequence[Any], num_texts: int) -> list[list[Any]]:
    """The pictures before each text, in the order of their list."""
    before: list[list[Any]] = [[] for _ in range(num_texts)]
    for image in images:
        index = image.get(_MATCHED) if isinstance(image, dict) else None
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < num_texts:
            raise SampleError(f"a picture has {_MATCHED} = {index!r:.40}; legal: 0 ... {num_texts - 1}")
        before[index].append(image)
    return before


def _with_text(parts: list[Part], text: str) -> list[Part]:
    if parts and parts[-1].modality == TEXT:
        return [*parts[:-1], Part(TEXT, f"{parts[-1].data} {text}")]
    return [*parts, Part(TEXT, text)]


def _name(picture: Any) -> Any:
    return picture.get(_NAME) if isinstance(picture, dict) else picture


def _content(picture: Any, key: str, sample: Mapping[str, bytes]) -> bytes | None:
    """The file of a picture; None if the sample has none."""
    if isinstance(picture, dict) and isinstance(picture.get(_BASE64), str):
        try:
            return base64.b64decode(picture[_BASE64], validate=True)
        except ValueError:
            raise SampleError(f"a picture's {_BASE64} is no base64") from None
    name = _name(picture)
    if not isinstance(name, str):
        raise SampleError(f"a picture is null, a name or a table; got {picture!r:.60}")
    stem = key.rpartition("/")[2].replace("%2E", ".") + "."
    file = name.rpartition("/")[2]
    content = member(sample, name)
    return member(sample, file.removeprefix(stem)) if content is None and file.startswith(stem) else content
