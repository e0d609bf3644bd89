"""Raw documents: the form in which a user brings data, and in which the demo corpus is written.

An ordinary WebDataset tar. Each document is a sample: one `KEY.json`, and beside it the files it names.

    000017.json    {"parts": [{"text": "A red 3 left of a blue 5."}, {"image": "0.png"}, {"speech": "0.wav"}]}
    000017.0.png   PNG, JPEG, WebP, GIF, BMP, PPM or TIFF
    000017.0.wav   WAV of 8 to 32 bits, FLAC, MP3, Ogg; 1,000 to 384,000 Hz; channels are averaged

`parts` is the document in reading order: text, pictures and utterances interleaved in any number. A part is a
table with one key, its modality; its value is the text itself, or the name of the file after "KEY.". Any
modality that has a table in the data config may be a part. `"loss": false` beside the modality, as in
{"text": "Q: How many?", "loss": false}, makes the part context: the model reads it and is not trained to
write it.
Other keys beside "parts" are ignored, so shards may carry whatever else their owner needs. Keys hold no
dots (WebDataset ends the key at the first; [source] keys_with_dots reads others) and are not repeated within
a shard. Endings may be in capital letters. Data of other layouts is declared (layout.py). A sample keeps
the limits of data_pipeline/tokenize/limits.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.files.json_text import parse_json
from data_pipeline.files.printable import printable
from data_pipeline.shards.vocabulary import TEXT

JSON, LOSS = "json", "loss"


_LONGEST_MESSAGE = 400
"""Characters of a reason that are kept: names and values of the data may be in it."""


class SampleError(ValueError):
    """A sample that cannot be used; the message says why. What it quotes of the data is escaped and cut."""

    def __init__(self, message: str) -> None:
        shown = printable(message[: _LONGEST_MESSAGE + 1])
        super().__init__(shown if len(message) <= _LONGEST_MESSAGE else f"{shown[:_LONGEST_MESSAGE]}...")


@dataclass(frozen=True)
class Part:
    """An element of a raw document's `parts`. `data` is a str for text, else the bytes of the file."""

    modality: str
    data: Any
    loss: bool = True
    """Whether its tokens are targets."""


def parse_document(sample: Mapping[str, bytes]) -> list[Part]:
    """The parts of a sample {extension: bytes}. Raises SampleError for what the format does not allow."""
    content = member(sample, JSON)
    if content is None:
        raise SampleError(f"no .{JSON} member, only {_listed(sample)}{_ADVICE}")
    document = json_content(content)
    parts = document.get("parts") if isinstance(document, dict) else None
    if not isinstance(parts, list) or not parts:
        raise SampleError(f'.{JSON} needs a list "parts" with at least one part{_ADVICE}')
    return [_parse_part(part, sample) for part in parts]


_ADVICE = "; for data of another layout, `motley look` on its folder prints the table [source] that reads it"


def json_content(content: bytes) -> Any:
    """Return what a .json member holds. Raises SampleError for what is not valid JSON."""
    try:
        return parse_json(content)
    except ValueError as error:
        raise SampleError(f".{JSON} is not valid JSON: {error}") from None


def _listed(sample: Mapping[str, bytes]) -> str:
    """The names of a sample's first files; keys with dots make samples of a whole shard."""
    more = f" and {len(sample) - 5} more" if len(sample) > 5 else ""
    return f"{sorted(sample)[:5]}{more}"


def member(sample: Mapping[str, bytes], ending: str) -> bytes | None:
    """The member of that ending, in small or capital letters."""
    if ending in sample:
        return sample[ending]
    return next((content for name, content in sample.items() if name.lower() == ending.lower()), None)


def _parse_part(part: object, sample: Mapping[str, bytes]) -> Part:
    loss = part.get(LOSS, True) if isinstance(part, dict) else None
    named = [key for key in part if key != LOSS] if isinstance(part, dict) else []
    if len(named) != 1 or not isinstance(loss, bool):
        raise SampleError(
            f'a part is a table with one key, its modality, and "{LOSS}": false where it is context; got '
            f"{part!r:.80}"
        )
    modality, value = named[0], part[named[0]]  # type: ignore[index]
    if not isinstance(value, str):
        raise SampleError(f"a part is {{modality: text or name of a file}}; got {part!r:.80}")
    if modality == TEXT:
        return Part(modality, value, loss)
    content = member(sample, value)
    if content is None:
        raise SampleError(f'the {modality} part "{value}" is missing; files here: {sorted(sample)}')
    return Part(modality, content, loss)


def document_sample(parts: Sequence[Part], suffixes: Mapping[str, str]) -> dict[str, bytes]:
    """The sample of a document: its .json, and files that are numbered per suffix.

    `suffixes`: modality -> ending of its files, such as {"image": "png"}.
    """
    files: dict[str, bytes] = {}
    listed: list[dict[str, Any]] = []
    counts = dict.fromkeys(suffixes.values(), 0)
    for part in parts:
        context: dict[str, Any] = {} if part.loss else {LOSS: False}
        if part.modality == TEXT:
            listed.append({TEXT: part.data, **context})
            continue
        suffix = suffixes[part.modality]
        name = f"{counts[suffix]}.{suffix}"
        counts[suffix] += 1
        files[name] = part.data
        listed.append({part.modality: name, **context})
    return {JSON: json.dumps({"parts": listed}, ensure_ascii=False).encode(), **files}
